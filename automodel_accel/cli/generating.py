"""automodel-accel generate."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from automodel_accel.cli.errors import fail
from automodel_accel.cli.training import speak

EPILOG = (
    'Examples:\n\nautomodel-accel generate runs/smollm2_lora --prompt "What is AI?"\n\n'
    'automodel-accel generate demo:smollm2 --prompt "Once upon a time" --plain --temperature 0.8 --seed 1\n\n'
    "automodel-accel generate runs/vlm --prompt 'What is this?' --image picture.png\n\n"
    "automodel-accel generate runs/smollm2_lora --prompts questions.jsonl --json"
)


def generate(
    model: Annotated[str, typer.Argument(help="Folder of a run, an adapter or a model; hub id; demo:NAME.")],
    prompt: Annotated[list[str] | None, typer.Option(help="What is asked; repeatable.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines of {prompt: ...} or {messages: [...]}.", metavar="FILE")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the assistant is told beforehand.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="For models that see; repeatable.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Go on with the text itself, without the chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens of an answer.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of probability that is drawn from.", min=0, max=1)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    base: Annotated[bool, typer.Option("--base", help="What was trained, as it was before.")] = False,
    step: Annotated[int | None, typer.Option(help="Of a run: its checkpoint of this step.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON line an answer, instead of the text as it comes.")
    ] = False,
) -> None:
    """Have a model answer."""
    speak()
    try:
        from automodel_accel.recipes.opening import open_model

        asked = [*({"prompt": text} for text in prompt or ()), *_read(prompts)]
        if not asked:
            raise ValueError("nothing is asked; give --prompt TEXT or --prompts FILE.")
        opened = open_model(model, base=base, step=step)
        if opened.tokenizer is None:
            raise ValueError(f"{model} has no tokenizer; expected one in its folder.")
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
        )
        settings = {"max_new_tokens": max_new_tokens, **sampling}
        for number, one in enumerate(asked):
            inputs = _inputs(opened, _messages(one, system, image or ()), plain)
            text = _answer(opened, inputs, settings, seed + number, stream=not as_json)
            if as_json:
                print(json.dumps({**one, "answer": text}, ensure_ascii=False), flush=True)
    except ValueError as error:
        fail(str(error))


def _read(path: Path | None) -> list[dict[str, Any]]:
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"--prompts {path}: {error.strerror}.") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error.msg}.") from error
        if not isinstance(row, dict) or not ({"prompt", "messages"} & row.keys()):
            raise ValueError(f'{path}, line {number}: expected {{"prompt": ...}} or {{"messages": [...]}}.')
        rows.append(row)
    return rows


def _messages(row: dict[str, Any], system: str | None, images: Any) -> list[dict[str, Any]]:
    if "messages" in row:
        return list(row["messages"])
    content: Any = row["prompt"]
    if images:
        content = [
            *({"type": "image", "path": str(image)} for image in images),
            {"type": "text", "text": row["prompt"]},
        ]
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": content}]


def _inputs(opened: Any, messages: list[dict[str, Any]], plain: bool) -> Any:
    reader = opened.tokenizer
    device = next(opened.model.parameters()).device
    has_template = bool(getattr(reader, "chat_template", None))
    if plain or not has_template:
        if any(not isinstance(message["content"], str) for message in messages):
            raise ValueError("an image needs the chat template of a model that sees; this one has none.")
        return reader(text="\n".join(message["content"] for message in messages), return_tensors="pt").to(device)
    made = reader.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return made.to(device)


def _answer(opened: Any, inputs: Any, settings: dict[str, Any], seed: int, stream: bool) -> str:
    import torch
    from transformers import TextStreamer

    tokenizer = getattr(opened.tokenizer, "tokenizer", opened.tokenizer)
    torch.manual_seed(seed)
    end = {"pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    with torch.no_grad():
        tokens = opened.model.generate(**inputs, **settings, **end, streamer=streamer)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
