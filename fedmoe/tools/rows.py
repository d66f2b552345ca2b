"""The rows that an evaluation is about: finds the files of each domain, and encodes them as its workers do."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fedmoe.data.bad_rows import BadRows
from fedmoe.data.encode import Learn
from fedmoe.data.examples import make_examples
from fedmoe.data.flat import FlatExamples
from fedmoe.data.jsonl import DataFile
from fedmoe.errors import DataError, SettingsError, UnknownExpertError
from fedmoe.model.bounds import check_examples
from fedmoe.protocol.names import check_name, clean_name
from fedmoe.tools.evaluate import MEAN

VALID = "valid"


def find_files(
    texts: Sequence[str], experts: Sequence[str], *, option: str = "data", kind: str = "test"
) -> dict[str, Path]:
    """Resolve `expert=file.jsonl`, or a directory with `<expert>.<kind>.jsonl` or `<expert>.jsonl`, to {domain: file}.

    Rows of the kind VALID are only those of `<expert>.valid.jsonl`, for `<expert>.jsonl` may be test rows.

    Raises:
        SettingsError: if a text is neither, or a domain occurs twice.
        DataError: if a directory has no file for any of the experts.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if Path(text).is_dir():
            here = _in_directory(Path(text), experts, option, kind)
        elif equals:
            here = {check_name("domain", name): Path(file)}
        else:
            raise _no_data(text, option, "a directory, or EXPERT=FILE")
        if twice := sorted(found.keys() & here.keys() | {MEAN} & here.keys()):
            why = "is reserved for the mean of all domains" if twice[0] == MEAN else "occurs twice"
            raise SettingsError(f"the domain {twice[0]!r} {why}: give it another name", about=twice[0])
        found |= here
    return found


def find_training_files(
    texts: Sequence[str], experts: Sequence[str], test: Mapping[str, Path]
) -> dict[str, Path]:
    """Like find_files, with `<expert>.train.jsonl`; each must be an expert's, and none of the `test` files.

    Raises:
        UnknownExpertError, SettingsError, DataError: if one is not; else as find_files.
    """
    found = find_files(texts, experts, option="train", kind="train")
    if unknown := sorted(found.keys() - set(experts)):
        raise UnknownExpertError(
            f"--train names the expert {unknown[0]!r}, which there is not; there are: {', '.join(experts)}",
            about=unknown[0],
        )
    tested = {path.resolve() for path in test.values()}
    if both := [path for path in found.values() if path.resolve() in tested]:
        raise SettingsError(
            f"{both[0]} is given as --train and as --data: the loss is measured on rows that nobody trained on",
            about="train",
        )
    return found


def find_validation_files(texts: Sequence[str], experts: Sequence[str]) -> dict[str, Path]:
    """Like find_files, with `<expert>.valid.jsonl`; a file alone, of pooled rows, is a domain of its own name.

    Raises:
        UnknownExpertError: if a text names an expert that is not among these.
        SettingsError: if a file is named as test rows; else as find_files.
    """
    for text in texts:
        name, equals, _ = text.partition("=")
        if equals and name not in experts and not Path(text).is_dir():
            raise UnknownExpertError(
                f"--data names the expert {name!r}, which is none of those to fit ({', '.join(experts)}): give one of "
                "these, or the file alone if its rows are of no one expert",
                about=name,
            )
        if "=" not in text and not Path(text).exists():
            raise _no_data(text, "data", "a directory, a file, or EXPERT=FILE")
    named = [
        f"{clean_name(Path(text).name.removesuffix('.gz').removesuffix('.jsonl'))}={text}"
        if "=" not in text and Path(text).is_file()
        else text
        for text in texts
    ]
    found = find_files(named, experts, kind=VALID)
    if tests := [path for path in found.values() if ".test." in path.name]:
        raise SettingsError(
            f"{tests[0]} is named as test rows, which measure a gateway and never choose one: give validation rows",
            about="test",
        )
    return found


def _no_data(text: str, option: str, takes: str) -> SettingsError:
    what = f"{text!r} is a file of no expert" if Path(text).exists() else f"there is no {text!r}"
    return SettingsError(f"{what}: --{option} takes {takes}", about=option)


def _in_directory(directory: Path, experts: Sequence[str], option: str, kind: str) -> dict[str, Path]:
    found = {}
    for name in experts:
        candidates = [directory / f"{name}.{kind}.jsonl"]
        if kind != VALID:
            candidates.append(directory / f"{name}.jsonl")
        if file := next((path for path in candidates if path.is_file()), None):
            found[name] = file
    if not found:
        wanted = ", ".join(f"{name}.{kind}.jsonl" for name in experts)
        raise DataError(
            f"{directory} holds none of {wanted}: name the files, for example --{option} {experts[0]}=FILE",
            about=option,
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """Encodes the rows of each domain with its expert's chat template; of a domain without one, with the first's.

    Args:
        tokenizer, config: of the base model.
        templates: expert -> its chat template, "" for the tokenizer's own.
        max_length, learn, bad_rows, report: as in `make_examples`.
    """

    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    templates: Mapping[str, str]
    max_length: int
    learn: Learn
    bad_rows: BadRows
    report: Callable[[str], None]

    def examples(self, domain: str, data: DataFile, *, sample: int = 0) -> FlatExamples:
        """The examples of a file, or of `sample` of its rows.

        Raises:
            DataError: if no row can be used.
        """
        template = self.templates.get(domain, next(iter(self.templates.values())))
        made = make_examples(
            data,
            with_template(self.tokenizer, template),
            self.max_length,
            self.bad_rows,
            learn=self.learn,
            sample=sample,
            report=self.report,
        )
        self.report(f"{data.path}: {made.summary()}")
        check_examples(made.examples, data.path, self.tokenizer, self.config)
        return made.examples


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy with the expert's own chat template."""
    if not template:
        return tokenizer
    other = copy(tokenizer)
    other.chat_template = template
    return other
