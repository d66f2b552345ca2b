"""The tokenizer with which an exported adapter was trained, as files; imports transformers."""

from pathlib import Path
from tempfile import TemporaryDirectory

from fedmoe.errors import BaseModelError
from fedmoe.model.tokenizer import load_tokenizer, tokenizer_fingerprint
from fedmoe.protocol.identity import BaseIdentity, expert_template
from fedmoe.tools.export import Export
from fedmoe.tools.rows import with_template


def tokenizer_files(export: Export, base_model: str) -> dict[str, bytes]:
    """The files of the tokenizer, with the chat template of the adapter's workers, by their path in its directory.

    Args:
        export: the adapter.
        base_model: hub id or directory of the base model.

    Raises:
        BaseModelError: if it cannot be loaded, or is not the tokenizer that the workers have.
    """
    tokenizer = load_tokenizer(base_model)
    for expert, meta in export.metas.items():
        theirs = with_template(tokenizer, expert_template(export.specs[expert], meta))
        here = BaseIdentity(fingerprint=meta.base_fingerprint, tokenizer=tokenizer_fingerprint(theirs))
        if refusal := here.refusal(meta, expert):
            raise BaseModelError(refusal, about=here.differing(meta)[0])
    with TemporaryDirectory(prefix="fedmoe-") as directory:
        with_template(tokenizer, export.chat_template).save_pretrained(directory)
        # A tokenizer with several named chat templates writes them into a folder.
        files = (path for path in sorted(Path(directory).rglob("*")) if path.is_file())
        return {str(path.relative_to(directory)): path.read_bytes() for path in files}
