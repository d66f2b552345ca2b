"""Prompt and answer as tokens, under templates that behave like those of the well-known model families."""

import json
from dataclasses import asdict, replace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedmoe.data.chat import Encoder
from fedmoe.data.turns import Turn
from fedmoe.errors import DataError, RowError
from tests.errors import raises
from tests.tiny import END, tiny_tokenizer

SYSTEM = Turn(role="system", content="s")
USER = Turn(role="user", content="q")
EARLIER = Turn(role="assistant", content="e")
ANSWER = Turn(role="assistant", content="a")

ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ '<bos>' }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + ALTERNATE
    + "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
    " + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<bos>' }}" + ALTERNATE + "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content "
    "+ ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% for m in messages %}{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + "
    "m.content.split('</think>')[0].split('<think>')[-1].strip('\n') * ('</think>' in m.content) "
    "+ '\n</think>\n\n' }}{% endif %}{{ text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN35 = QWEN3.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
DEEPSEEK = (
    "{{ '<bos>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '<user>' + m.content }}{% else %}"
    "{{ '<model>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<model><think>\n' }}{% endif %}"
)
HARMONY = (
    "{% for m in messages %}{{ '<start>' + m.role + '<channel>final' * (m.role == 'assistant') + '<message>' "
    "+ m.content + ('<return>' if loop.last and m.role == 'assistant' else '<end>') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<' + m.role + '>\n' + m.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
DEAF = (
    "{% for m in messages if m.role != 'system' %}{{ m.content + '<end>' }}{% endfor %}"  # drops system turns
)
LINES = "{% for m in messages %}{{ m.content + '\n' * (m.role != 'assistant') }}{% endfor %}"
BOS = "<bos>"
CONTROL = [
    BOS, "<eos>", "<start_of_turn>", "<end_of_turn>", "<user>", "<assistant>", "<model>",
    "<start>", "<channel>", "<message>", "<return>", "<end>",
]  # fmt: skip


def tokenizer(template: str, eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    """The tiny tokenizer with other control tokens and another template; `<think>` is plain text to it."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, bos_token=BOS, eos_token=eos
    )
    made.add_tokens(CONTROL, special_tokens=True)
    made.chat_template = template
    return made


def encode(tokens: PreTrainedTokenizerFast, prompt: list[Turn], answer: str) -> tuple[str, str]:
    """Both parts as text, control tokens included."""
    encoder = Encoder(tokens)
    prepared = encoder.prepare((*prompt, Turn(role="assistant", content=answer)))
    ids = encoder.encode(prepared.turns)
    return tokens.decode(ids[0]), tokens.decode(ids[1])


FAMILIES = {
    "ChatML": (
        None,
        [SYSTEM, USER],
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        "a<|im_end|>",
    ),
    "Gemma": (
        GEMMA,
        [USER],
        "<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n",
        "a<end_of_turn>",
    ),
    "Gemma, system": (
        GEMMA,
        [SYSTEM, USER],
        "<bos><start_of_turn>user\ns\n\nq<end_of_turn>\n<start_of_turn>model\n",
        "a<end_of_turn>",
    ),
    "Mistral": (MISTRAL, [USER], "<bos>[INST] q [/INST]", " a<eos>"),
    "Mistral, two users": (MISTRAL, [USER, USER], "<bos>[INST] q\n\nq [/INST]", " a<eos>"),
    "Mistral, turns": (
        MISTRAL,
        [SYSTEM, USER, EARLIER, USER],
        "<bos>[INST] s\n\nq [/INST] e<eos>[INST] q [/INST]",
        " a<eos>",
    ),
    "Qwen3": (
        QWEN3,
        [USER],
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\na<|im_end|>",
    ),
    "Qwen3.5": (
        QWEN35,
        [USER],
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "\n</think>\n\na<|im_end|>",
    ),
    "DeepSeek": (DEEPSEEK, [USER], "<bos><user>q<model><think>\n", "\n</think>\n\na<eos>"),
    "Harmony": (
        HARMONY,
        [USER],
        "<start>user<message>q<end><start>assistant",
        "<channel>final<message>a<return>",
    ),
    "Phi": (PHI, [USER], "<user>\nq<end>\n<assistant>\n", "a<end>"),
    "no end of turn": (PLAIN, [USER], "### user\nq\n\n### assistant\n", "a<eos>"),
    "system dropped": (DEAF, [SYSTEM, USER], "s\n\nq<end>", "a<end>"),
}


@pytest.mark.parametrize(("template", "turns", "prompt", "answer"), FAMILIES.values(), ids=FAMILIES)
def test_a_family(template: str | None, turns: list[Turn], prompt: str, answer: str) -> None:
    """The prompt as the model is asked, then the answer with what the template puts around it."""
    tokens = tiny_tokenizer() if template is None else tokenizer(template)
    assert encode(tokens, turns, "a") == (prompt, answer)


@pytest.mark.parametrize("template", [QWEN3, QWEN35, DEEPSEEK], ids=["Qwen3", "Qwen3.5", "DeepSeek"])
def test_reasoning_in_the_data_is_kept_and_begun_once(template: str) -> None:
    """Also where the template opens it in the prompt, puts an empty one first, or would drop it."""
    prompt, answer = encode(tokenizer(template), [USER], "<think>\nbecause\n</think>\n\na")
    assert (prompt + answer).count("<think>\nbecause\n</think>\n\na<") == 1
    assert (prompt + answer).count("think>") == 2


@pytest.mark.parametrize("template", [GEMMA, MISTRAL, QWEN35, DEEPSEEK, HARMONY, PHI, PLAIN])
def test_the_prompt_is_what_the_model_will_be_asked(template: str) -> None:
    """Id by id what apply_chat_template gives; one begin-of-sequence token even if both would write it."""
    tokens = tokenizer(template)
    bos = tokens.bos_token_id
    tokens.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    asked = tokens.apply_chat_template([asdict(USER)], add_generation_prompt=True, return_dict=False)
    prompt, answer = Encoder(tokens).encode((USER, ANSWER))
    assert prompt == asked
    assert (prompt + answer).count(bos) == ("<bos>" in template)


QWEN3_REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' }}{% if m.reasoning_content is string %}"
    "{{ m.reasoning_content.strip('\n') }}{% endif %}{{ '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HARMONY_REASONING = HARMONY.replace(
    "'<start>' + m.role",
    "('<start>assistant<channel>analysis<message>' + m.thinking + '<end>' if m.thinking and loop.last else '')"
    " + '<start>' + m.role",
)
REASONING = {
    "Qwen3": (QWEN3_REASONING, "<think>\nbecause\n</think>\n\na<|im_end|>"),
    "Qwen3.5": (
        QWEN3_REASONING.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"),
        "because\n</think>\n\na<|im_end|>",
    ),
    "Harmony": (
        HARMONY_REASONING,
        "<channel>analysis<message>because<end><start>assistant<channel>final<message>a<return>",
    ),
}


@pytest.mark.parametrize(("template", "answer"), REASONING.values(), ids=REASONING)
def test_reasoning_beside_an_answer_is_learnt_as_the_template_writes_it(template: str, answer: str) -> None:
    """Under the name that the template reads; an earlier turn's is left to the template, as the model is asked."""
    tokens = tokenizer(template)
    thought = replace(ANSWER, reasoning="because")
    for turns in ([USER], [USER, replace(EARLIER, reasoning="earlier"), USER]):
        ids = Encoder(tokens).encode((*turns, thought))
        assert tokens.decode(ids[1]) == answer
        assert ids[0] == tokens.apply_chat_template(
            [asdict(turn) for turn in turns], add_generation_prompt=True, return_dict=False
        )


@pytest.mark.parametrize("template", [PHI, QWEN3, MISTRAL])
def test_reasoning_that_the_template_does_not_show_is_refused(template: str) -> None:
    """Never an empty block in its place; nor is reasoning of an earlier turn dropped without a word."""
    thought = replace(ANSWER, reasoning="because")
    for turns in ((USER, thought), (USER, thought, USER, ANSWER)):
        with raises(RowError, about="reasoning"):
            Encoder(tokenizer(template)).encode(turns)
    closed = QWEN3_REASONING.replace(
        "assistant\n' }}{% endif %}", "assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
    )
    with raises(RowError, about="prompt"):
        Encoder(tokenizer(closed)).encode((USER, thought))
    with raises(RowError, about="think"):
        Encoder(tokenizer(QWEN3_REASONING)).encode((USER, replace(thought, content="<think>b</think>a")))


TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {}}},)
WITH_TOOLS = (
    "{% if tools %}{{ '<tools>' + tools | tojson + '</tools>\n' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ '<result>' + m.content | tojson + '<end>' }}"
    "{% else %}{{ '<' + m.role + '>\n' + m.content + '<end>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)
WITHOUT_TOOLS = (
    "{% for m in messages if m.role in ('system', 'user', 'assistant') %}"
    "{{ '<' + m.role + '>\n' + m.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)
RESULT = Turn(role="tool", content='"17"\n')


def test_tools_are_handed_to_the_template() -> None:
    """And so is what they returned, however the template writes it."""
    tokens = tokenizer(WITH_TOOLS)
    prompt, answer = Encoder(tokens).encode((USER, EARLIER, RESULT, ANSWER), TOOLS)
    text = tokens.decode(prompt)
    assert text.startswith('<tools>[{"type": "function", "function": {"name": "weather"')
    assert '<result>"\\"17\\"\\n"<end>' in text
    assert tokens.decode(answer) == "a<end>"


def test_what_the_template_drops_is_refused() -> None:
    """A tool's turn, tools, an answer: nothing is trained on less than what the row says."""
    needs_tools = WITH_TOOLS.replace("{% if tools %}", "{% for t in tools %}{% endfor %}{% if tools %}")
    Encoder(tokenizer(needs_tools)).encode((USER, ANSWER), TOOLS)
    encoder = Encoder(tokenizer(WITHOUT_TOOLS))
    with raises(RowError, about="tool"):
        encoder.encode((USER, EARLIER, RESULT, ANSWER))
    with raises(RowError, about="tools"):
        encoder.encode((USER, ANSWER), TOOLS)
    with raises(RowError, about="answer"):
        Encoder(tokenizer(WITHOUT_TOOLS.replace(", 'assistant'", ""))).encode((USER, ANSWER))


@pytest.mark.parametrize(
    "answer", ["  indented\n", "\n\na\n\n", "a </s> b", "im", "end", "\ue000", "日本\r\n"]
)
@pytest.mark.parametrize("template", [GEMMA, HARMONY, PHI])
def test_the_answer_is_learnt_as_it_stands(template: str, answer: str) -> None:
    """No white space is trimmed, and an answer that looks like part of the template confuses nothing."""
    lead, end = {
        GEMMA: ("", "<end_of_turn>"),
        HARMONY: ("<channel>final<message>", "<return>"),
        PHI: ("", "<end>"),
    }[template]
    assert encode(tokenizer(template), [USER], answer)[1] == lead + answer + end


@pytest.mark.parametrize(
    "answer", ["a<end_of_turn>", "a<end_of_turn>\n", "a<eos>", "a<eos><end_of_turn>", "a<end_of_turn> <eos>"]
)
def test_an_answer_that_brings_its_end_of_turn_ends_once(answer: str) -> None:
    """Files written for other tools often hold the control token."""
    assert encode(tokenizer(GEMMA), [USER], answer)[1] == "a<end_of_turn>"


@pytest.mark.parametrize("answer", ["", " \n\t", "<eos>", " <end_of_turn>\n"])
def test_an_empty_answer_is_refused(answer: str) -> None:
    """Also one of white space, or of nothing but the end of turn."""
    with raises(DataError, about="answer"):
        encode(tokenizer(GEMMA), [USER], answer)


def test_turns_that_the_template_refuses_are_named_with_its_own_words() -> None:
    """Nothing is trained on turns that the model can never see."""
    with pytest.raises(
        DataError, match=r"the chat template refuses it \(roles must alternate user and assistant\)"
    ):
        encode(tokenizer(MISTRAL), [EARLIER], "a")
    with raises(DataError, about="chat_template"):
        encode(tokenizer("{{ nothing.at.all }}"), [USER], "a")


def test_without_a_template_nothing_is_made_up() -> None:
    """Turns joined in some other way are nothing that the model will be asked with."""
    with raises(DataError, about="chat_template"):
        Encoder(PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer))


def test_no_token_straddles_the_border() -> None:
    """A tokenizer that merges two newlines: the prompt stays as it is when the model is asked."""
    core = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    core["model"]["vocab"]["ĊĊ"] = 259
    core["model"]["merges"] = [["Ċ", "Ċ"]]
    tokens = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)), eos_token=END)
    tokens.chat_template = LINES
    assert 259 in tokens("q\n\na").input_ids
    prompt, answer = Encoder(tokens).encode((USER, replace(ANSWER, content="\na")))
    assert prompt == tokens("q\n").input_ids
    assert tokens.decode(answer) == "\na<|im_end|>"


def test_no_space_is_put_in_front_of_the_answer() -> None:
    """A tokenizer that begins every text with a space mark, as SentencePiece does."""
    letters = {letter: i for i, letter in enumerate("▁\nqa")}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    tokens = PreTrainedTokenizerFast(tokenizer_object=core)
    tokens.chat_template = LINES
    assert tokens("a").input_ids == [letters["▁"], letters["a"]]
    ids = Encoder(tokens).encode((USER, ANSWER))
    assert ids == ([letters["▁"], letters["q"], letters["\n"]], [letters["a"]])
