"""NeMo Automodel's recipes, read as ours: every key has a counterpart, changes nothing, or is named.

translation = translate(parse_theirs(text, "their.yaml"))
translation.recipe        # a YAML file of ours, as a mapping
translation.unmapped      # what changes what is computed, and has no counterpart
"""

import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from automodel_accel.kernels.facts import environment
from automodel_accel.recipes.nemo.contract import Differs, Ignored, Note, Rule, To, Translation, Unmapped
from automodel_accel.recipes.nemo.datasets import DATA, HELD_OUT, IMAGES, dataset_rule, finished
from automodel_accel.recipes.nemo.keys import rule_of
from automodel_accel.recipes.nemo.targets import target_rule
from automodel_accel.recipes.reading import Entry, RecipeError, parse

logger = logging.getLogger("automodel_accel")
_THEIRS = re.compile(r"^\s*(_target_:|step_scheduler:|.*\bnemo_automodel\.)", re.MULTILINE)
_ENVIRONMENT = re.compile(r"\$\{oc\.env:([A-Za-z_]\w*)(?:,([^}]*))?\}")
_OTHER = re.compile(r"\$\{(?!env:)")
PLACES = {"dataset": DATA, "validation_dataset": HELD_OUT}
ONLY_THEIRS = (
    "step_scheduler",
    "dist_env",
    "distributed",
    "dataset",
    "validation_dataset",
    "packed_sequence",
    "lr_scheduler",
    "peft",
)
WITH_SOUND = re.compile(r"omni|audio|3n|gemma-4-e|phi-4-multimodal|voxtral|qwen2-audio|inkling", re.IGNORECASE)


def is_theirs(text: str) -> bool:
    """Whether a YAML file is NeMo Automodel's: it has a `_target_`, or their step_scheduler."""
    return bool(_THEIRS.search(text))


def parse_theirs(text: str, source: str) -> Entry:
    """Their YAML, with places. ${oc.env:NAME,default} is read from the environment; other ${...} stay as they are.

    Raises:
        RecipeError: no YAML.
    """
    known = environment()

    def looked_up(match: re.Match[str]) -> str:
        return known.get(match[1], match[2] or "")

    return parse(_OTHER.sub("$ {", _ENVIRONMENT.sub(looked_up, text)), source)


def translate(entry: Entry) -> Translation:
    """Their recipe in our words."""
    found = Translation()
    kinds = {section: _kind(entry, section) for section in PLACES}
    leaves = list(_leaves(entry))
    for key, leaf in leaves:
        section, _, rest = key.partition(".")
        value = leaf.plain()
        if section in PLACES and rest and not rest.endswith("_target_"):
            _take(found, key, leaf, _placed(dataset_rule(kinds[section], rest, value), PLACES[section]))
        elif section in PLACES and rest == "_target_":
            _take_data(found, key, leaf, PLACES[section])
        elif section in PLACES:
            _note(found.ignored, key, leaf, "there is none")
        else:
            _take(found, key, leaf, rule_of(key, value))
    _finish(found, dict(leaves))
    return found


def read_theirs(text: str, source: str, overrides: Sequence[str] = ()) -> Entry:
    """Their YAML as an entry of ours, to be filled into a Recipe. What is left out is logged.

    Raises:
        RecipeError: no YAML; a key that changes what is computed and has no counterpart; or an override by a key of theirs.
    """
    found = translate(parse_theirs(text, source))
    _check_overrides(overrides)
    if found.unmapped:
        named = "\n".join(map(str, found.unmapped))
        raise RecipeError(
            f"{named}\n{source}: the keys above change what is computed, and have no counterpart; "
            "`automodel-accel convert-recipe --allow-unmapped` writes the recipe without them, to be looked at."
        )
    for note in found.differs:
        logger.warning("%s", note)
    if found.ignored:
        logger.warning(
            "%s: %d keys change nothing here; `automodel-accel convert-recipe` names them.", source, len(found.ignored)
        )
    return parse(yaml.safe_dump(found.recipe, sort_keys=False), f"{source} (translated)")


def _check_overrides(overrides: Sequence[str]) -> None:
    """Overrides are by our keys."""
    for text in overrides:
        key, _, value = text.removeprefix("--").partition("=")
        rule = rule_of(key, value)
        if key.split(".")[0] in ONLY_THEIRS:
            ours = f"; that is {rule.ours} here" if isinstance(rule, To) and rule.ours else ""
            raise RecipeError(
                f"--{key}: a key of NeMo Automodel's{ours}. Overrides go by our keys; see docs/migration_nemo.md."
            )


def _leaves(entry: Entry, key: str = "") -> Iterator[tuple[str, Entry]]:
    if isinstance(entry.value, dict) and entry.value:
        for name, inner in entry.value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else name)
    else:
        yield key, entry


def _kind(entry: Entry, section: str) -> str | None:
    """Which kind of ours a dataset is."""
    plain = entry.plain().get(section)
    target = plain.get("_target_") if isinstance(plain, dict) else None
    rule = target_rule(f"{section}._target_", target)
    while not isinstance(rule, To | Ignored | Differs | Unmapped):
        rule = rule(target)
    if not isinstance(rule, To):
        return None
    made = rule.value(target)
    return str(made["data.kind"] if isinstance(made, dict) else made)


def _placed(rule: Rule, place: str) -> Rule:
    """A rule of a dataset, with its whole key."""
    if not isinstance(rule, To):
        return rule
    return To(rule.ours[1:] if rule.ours.startswith("/") else f"{place}.{rule.ours}", rule.value)


def _take_data(found: Translation, key: str, leaf: Entry, place: str) -> None:
    rule = rule_of(key, leaf.plain())
    if isinstance(rule, To):
        made = rule.value(leaf.plain())
        values = made if isinstance(made, dict) else {rule.ours: made}
        placed = {place + ours.removeprefix(DATA): value for ours, value in values.items()}
        rule = To(next(iter(placed)), lambda _: placed)
    _take(found, key, leaf, rule)


def _take(found: Translation, key: str, leaf: Entry, rule: Rule) -> None:
    if isinstance(rule, Ignored):
        _note(found.ignored, key, leaf, rule.why)
    elif isinstance(rule, Differs):
        _note(found.differs, key, leaf, rule.why)
    elif isinstance(rule, Unmapped):
        _note(found.unmapped, key, leaf, rule.why)
    elif rule.value is None:
        _take_special(found, key, leaf)
    else:
        made = rule.value(leaf.plain())
        values = made if isinstance(made, dict) and rule.ours not in ("lora.settings",) else {rule.ours: made}
        if rule.ours or made:
            for ours, value in values.items():
                if value is not None or ours in ("checkpoint.every",):
                    found.put(ours, value)
        _note(
            found.mapped,
            key,
            leaf,
            rule.ours or ", ".join(values if made else ()) or "what ours does without being told",
        )


def _take_special(found: Translation, key: str, leaf: Entry) -> None:
    """Keys whose counterpart depends on another key."""
    value = leaf.plain()
    section, _, rest = key.partition(".")
    if key == "optimizer.weight_decay":
        found.put("optimizer.weight_decay", float(value))
        if value:  # theirs decays norms and biases too
            found.put("optimizer.groups", [{"pattern": "*", "weight_decay": float(value)}])
        said = "optimizer.weight_decay"
    elif key == "lr_scheduler.min_lr":
        said = "schedule.min_ratio"  # divided by the rate in the end
        found.put("schedule.min_ratio", float(value))
    elif section in ("wandb", "mlflow"):
        said = f"logging.settings.{section}"
        found.put(
            f"logging.settings.{section}.{'experiment_name' if rest == 'name' and section == 'mlflow' else rest}", value
        )
    elif section == "packed_sequence":
        said = "batching.packing, batching.seq_length"
        if not value:
            found.put("batching.packing", False)
        else:
            found.put("batching.packing", True)
            found.put("batching.seq_length", value)
    else:  # a setting of the model's config
        name = key.removeprefix("model.").removeprefix("config.")
        said = f"model.config.{name}"
        found.put(said, value)
    _note(found.mapped, key, leaf, said)


def _finish(found: Translation, leaves: dict[str, Entry]) -> None:
    """What their program does without being told, and what only all sections together tell."""
    recipe = found.recipe
    rate = recipe.get("optimizer", {}).get("lr")
    schedule = recipe.setdefault("schedule", {})
    if not any(key.startswith("lr_scheduler.") for key in leaves):
        schedule.update({"kind": "constant", "warmup": 0})
    else:
        schedule.setdefault("kind", "cosine")
        schedule.setdefault("warmup", 0.1)
        if rate and "min_ratio" in schedule:
            schedule["min_ratio"] = min(1.0, schedule["min_ratio"] / rate)
    if "packing" not in recipe.get("batching", {}):
        found.put("batching.packing", False)
    if any(key.startswith("packed_sequence.pack_size") for key in leaves):
        recipe["batching"]["packing"] = True
    if "wandb" in recipe.get("logging", {}).get("settings", {}):
        if leaves.get("wandb.enable") is not None and leaves["wandb.enable"].plain() is False:
            recipe["logging"]["settings"].pop("wandb")
        else:
            found.put("logging.trackers", ["wandb"])
    if leaves.get("checkpoint.enabled") is not None and leaves["checkpoint.enabled"].plain() is False:
        found.put("checkpoint.every", None)
    _finish_model(found)
    _finish_mesh(found, leaves)
    for place in (DATA, HELD_OUT):
        _finish_data(found, place)
    found.recipe = {name: section for name, section in recipe.items() if section not in ({}, None)}


def _finish_model(found: Translation) -> None:
    model = found.recipe.setdefault("model", {})
    config = model.get("config", {})
    if config and model.get("weights") != "random":
        # their settings of a config whose weights are loaded: those that shape it are for other checkpoints
        for note in [note for note in found.mapped if note.said.startswith("model.config.")]:
            found.mapped.remove(note)
            why = "sets the config of a model whose weights are loaded; save the model with it, and name its folder"
            found.unmapped.append(Note(note.key, note.value, note.place, why))
        model.pop("config")
    freeze = model.get("freeze", {})
    if freeze.get("audio_tower") and not WITH_SOUND.search(str(model.get("path", ""))):
        freeze.pop("audio_tower")  # their program passes over towers that a model has not; ours refuses
    model["freeze"] = {part: True for part, frozen in freeze.items() if frozen}
    if not model["freeze"]:
        model.pop("freeze")


def _finish_mesh(found: Translation, leaves: dict[str, Entry]) -> None:
    mesh = found.recipe.get("mesh", {})
    if mesh.get("sequence_parallel") and mesh.get("tensor", 1) == 1:
        mesh.pop("sequence_parallel")
    if mesh.get("strategy") in ("ddp", "megatron_fsdp"):
        for key in ("param_dtype", "offload"):
            mesh.pop(key, None)


def _finish_data(found: Translation, place: str) -> None:
    section, _, name = place.partition(".")
    settings: Any = found.recipe.get(section, {})
    settings = settings.get(name) if name else settings
    if not settings or "kind" not in settings:
        found.recipe.pop(section, None)
        return
    made = finished(settings)
    if made["kind"] in IMAGES:
        found.recipe.get("batching", {}).pop("packing", None)
    if name:
        found.recipe[section][name] = made
    else:
        found.recipe[section] = made


def _note(notes: list[Note], key: str, leaf: Entry, said: str) -> None:
    notes.append(Note(key, leaf.plain(), leaf.place, said))
