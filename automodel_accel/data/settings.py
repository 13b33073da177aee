"""What a data set is: one dataclass a kind, told apart by its field `kind`; and how its samples are put into batches."""

from dataclasses import dataclass, field
from typing import Any, Literal

from automodel_accel.kernels.contract import unknown_name

TooLong = Literal["truncate", "drop", "error"]
ROLES = (("question", "answer"), ("context", "question", "answer"), ("prompt", "completion"))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowData:
    """Rows from the hub or from files.

    Attributes:
        path: A file or folder of .json, .jsonl, .parquet, .csv or .txt (each also as .gz or .zst), a folder that
            `save_to_disk` of datasets wrote, or the name of a data set on the hub.
        name: Which configuration of the data set on the hub; None for its only one.
        split: Which split, as datasets writes it: "train", "validation[:5%]". A folder whose files are named after splits is
            read by those names; other files are one split of any name.
        streaming: Whether rows are read while training instead of all before it; nobody knows then how many batches an
            epoch has.
        limit: How many rows to take, from the first one on; None for all.
        shuffle: Whether rows come in a new order each epoch: of the whole data set, or where it streams of one window.
        seed: Of these orders.
        too_long: What happens to a sample of more tokens than a row holds: "truncate" cuts its end off, "drop" leaves it out,
            "error" stops. Each is counted.
        strict: Whether a row that cannot be used (columns missing, a conversation that the template refuses) stops the run;
            else it is counted and left out.
    """

    path: str
    name: str | None = None
    split: str = "train"
    streaming: bool = False
    limit: int | None = None
    shuffle: bool = True
    seed: int = 42
    too_long: TooLong = "drop"
    strict: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}, expected a number of rows, at least 1, or null for all.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateData(RowData):
    """Rows that the chat template of a tokenizer writes.

    Attributes:
        chat_template: Instead of the tokenizer's: the text of a Jinja template, or the path of a file with one.
        template_variables: What the template reads beside the messages: {"enable_thinking": False}.
    """

    chat_template: str | None = None
    template_variables: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatData(TemplateData):
    """Conversations: messages of a role and a content, with tools and tool calls in the shape of the OpenAI API.

    Attributes:
        messages: The column that holds them; None: "messages" or "conversations", whichever a row has. ShareGPT's {"from", "value"}
            are read too.
        tools: The column that holds JSON schemas of tools; rows without it have none.
        assistant_only: Whether only what the assistant wrote carries loss; else every token does.
        history: Answers before the last one: "learn" from them too; "mask" them; "split" makes one sample of each answer with
            all that was said before it, written as the model will see it then.
        mask_reasoning: Whether reasoning carries no loss, markers included.
        reasoning_markers: What stands around it in the text that the template writes.
    """

    kind: Literal["chat"] = "chat"
    messages: str | None = None
    tools: str = "tools"
    assistant_only: bool = True
    history: Literal["learn", "mask", "split"] = "learn"
    mask_reasoning: bool = False
    reasoning_markers: tuple[str, ...] = ("<think>", "</think>")

    def __post_init__(self) -> None:
        RowData.__post_init__(self)
        if len(self.reasoning_markers) != 2 or not all(self.reasoning_markers):
            raise ValueError(f"reasoning_markers is {self.reasoning_markers}, expected two texts.")
        if not self.assistant_only and (self.history != "learn" or self.mask_reasoning):
            raise ValueError(
                "assistant_only: false puts loss on every token, so history and mask_reasoning have nothing to choose; leave "
                "them out, or set assistant_only: true."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionData(TemplateData):
    """A question and its answer in columns of any names.

    Attributes:
        columns: What a column is -> its name, for "question" and "answer", with "context" if there is one; or for "prompt" and
            "completion", whose texts follow each other as they are.
        style: "chat" writes a user's and an assistant's message by the chat template, "plain" the texts alone; "auto" is "chat"
            where the tokenizer has a template.
        answer_only: Whether only the answer carries loss.
    """

    kind: Literal["instruction"] = "instruction"
    columns: dict[str, str] = field(default_factory=lambda: {"question": "question", "answer": "answer"})
    style: Literal["auto", "chat", "plain"] = "auto"
    answer_only: bool = True

    def __post_init__(self) -> None:
        RowData.__post_init__(self)
        for role in self.columns:
            if role not in {one for roles in ROLES for one in roles}:
                raise ValueError(f"columns: {unknown_name('column', role, ['context', *ROLES[0], *ROLES[2]])}")
        if set(self.columns) not in map(set, ROLES):
            expected = " or ".join(" and ".join(roles) for roles in ROLES)
            raise ValueError(f"columns are given for {', '.join(self.columns)}; expected {expected}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SquadData(TemplateData):
    """SQuAD: a question on a paragraph, from the hub or from a local file in the official nested schema or one row a question.

    Attributes:
        style: As for instruction data.
        answer_only: As for instruction data.
    """

    kind: Literal["squad"] = "squad"
    path: str = "rajpurkar/squad"
    style: Literal["auto", "chat", "plain"] = "auto"
    answer_only: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class HellaSwagData(RowData):
    """HellaSwag: a text and its right ending, from the hub or from the official JSON lines; loss on the ending."""

    kind: Literal["hellaswag"] = "hellaswag"
    path: str = "Rowan/hellaswag"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextData(RowData):
    """Documents for pretraining: every token carries loss.

    Attributes:
        column: The column that holds the text.
        too_long: As for all rows; or "split": a document of more tokens than a row holds becomes several samples.
    """

    kind: Literal["text"] = "text"
    column: str = "text"
    too_long: Literal["truncate", "drop", "error", "split"] = "split"  # type: ignore[assignment]  # one more than all rows


@dataclass(frozen=True, slots=True, kw_only=True)
class BinData:
    """Tokens in files that are mapped into memory.

    Attributes:
        path: A .bin or .npy file, a folder of them, or a pattern with *. A .bin file begins with the header of nanoGPT's fineweb
            scripts, or is nothing but tokens of `dtype`.
        dtype: Of a .bin file without header.
        document_end: The token that ends a document: what follows it does not see what came before. None: rows are one document.
        shuffle: Whether rows come in a new order each epoch.
        seed: Of that order.
        limit: How many rows to take, from the first one on; None for all.
    """

    kind: Literal["bins"] = "bins"
    path: str
    dtype: Literal["uint16", "uint32"] = "uint16"
    document_end: int | None = None
    shuffle: bool = True
    seed: int = 42
    limit: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MockData:
    """Random tokens, the same for the same seed: to measure speed, or to try a recipe without data.

    Attributes:
        vocab_size: Tokens are drawn from 0 to vocab_size - 1.
        samples: How many samples there are.
        shortest: Their least number of tokens; None for as many as a row holds, of which every one is then full.
        shuffle: Whether they come in a new order each epoch.
        seed: Of the tokens, the lengths and the orders.
    """

    kind: Literal["mock"] = "mock"
    vocab_size: int
    samples: int = 1024
    shortest: int | None = None
    shuffle: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        if self.vocab_size < 1 or self.samples < 1 or (self.shortest is not None and self.shortest < 2):
            raise ValueError(
                f"mock data of {self.samples} samples of at least {self.shortest} tokens of {self.vocab_size}; expected at least "
                "1 sample, 2 tokens and 1 word."
            )


DataSettings = ChatData | InstructionData | SquadData | HellaSwagData | TextData | BinData | MockData


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How samples become batches.

    Attributes:
        seq_length: Tokens a row, and the most a sample may have.
        batch_size: Rows a batch of one rank.
        packing: Whether a row holds as many samples as fit, none of which sees another; else one sample, padded.
        flat: Whether the packed rows of a batch are one row of batch_size * seq_length tokens. transformers' own
            flash_attention_2 keeps samples apart in a batch of one row only; automodel_accel's attention, sdpa and
            flex_attention do in any.
        group_by_length: Without packing: whether samples of about the same length share a batch.
        pad_to_multiple_of: Without packing: what the length of a padded batch is a multiple of.
        window: Rows, at least, of the windows that packing, grouping and a streamed shuffle work in.
        prefetch: Batches that a thread makes ready ahead; 0 makes them when they are asked for.
    """

    seq_length: int = 2048
    batch_size: int = 1
    packing: bool = True
    flat: bool = False
    group_by_length: bool = False
    pad_to_multiple_of: int = 8
    window: int = 1024
    prefetch: int = 2

    def __post_init__(self) -> None:
        for name, least in (
            ("seq_length", 2),
            ("batch_size", 1),
            ("pad_to_multiple_of", 1),
            ("window", 1),
            ("prefetch", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}.")
        if self.packing and self.group_by_length:
            raise ValueError(
                "group_by_length spares padding, of which packed rows have none; set packing: false, or leave it out."
            )
        if self.flat and not self.packing:
            raise ValueError("flat: true lays packed rows behind each other; set packing: true, or leave it out.")
