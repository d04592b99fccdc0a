"""Tiny models of many families of transformers, each with the loss that its own forward returns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.sweep.catalogue import configurations as tiny
from benchmarks.sweep.entries import AbsentError, Entry, Sample

CONFIGS = {"Gemma3": "Gemma3TextConfig"}
MODELS = {"GPT2": "GPT2LMHeadModel", "CTRL": "CTRLLMHeadModel"}
VIDEOS = ("Timesformer", "Vivit", "VideoMAE")


def entries() -> list[Entry]:
    """Return an entry for each family."""
    found = [
        _entry(family, f"{family}ForCausalLM", {**base, **own}, _tokens, glob)
        for family, (base, own, glob) in tiny.CAUSAL.items()
    ]
    found += [
        _entry(family, f"{family}ForSequenceClassification", {**base, **own}, _text, glob)
        for family, (base, own, glob) in tiny.CLASSIFIERS.items()
    ]
    found += [
        _entry(family, model, {**base, **own}, _pair, glob)
        for family, (model, base, own, glob) in tiny.TRANSLATORS.items()
    ]
    for family, (base, own, glob) in tiny.IMAGES.items():
        kind, batch = ("Video", _video) if family in VIDEOS else ("Image", _image)
        found.append(_entry(family, f"{family}For{kind}Classification", {**base, **own}, batch, glob))
    found += [
        _entry(
            family,
            f"{family}{tiny.HEARERS.get(family, 'ForSequenceClassification')}",
            {**base, **own},
            _sound,
            glob,
        )
        for family, (base, own, glob) in tiny.SOUNDS.items()
    ]
    return found


def _entry(
    family: str, model: str, config: tiny.Config, batch: Callable[[Any], Any], glob: str | None
) -> Entry:
    model = MODELS.get(family, model)
    find = partial(_find, CONFIGS.get(family, f"{family}Config"), model, config, batch)
    return Entry("transformers", family, model, find, glob, weight=1.0)


def _find(config: str, model: str, options: tiny.Config, batch: Callable[[Any], Any]) -> Callable[[], Sample]:
    try:
        import transformers
    except ImportError as error:
        raise AbsentError(str(error)) from error
    found = [getattr(transformers, name, None) for name in (config, model)]
    if None in found:
        raise AbsentError(f"transformers has no {config} and {model}")
    return partial(_make, *found, options, batch)


def _make(config: Any, model: Any, options: tiny.Config, batch: Callable[[Any], Any]) -> Sample:
    made = config(**options)
    inputs = batch(made)
    return Sample(model(made), inputs, inputs["labels"], loss="model")


def _ids(*shape: int) -> Any:
    import torch

    return torch.randint(4, tiny.VOCABULARY, shape)


def _labels() -> Any:
    import torch

    return torch.randint(0, 2, (2,))


def _tokens(config: Any) -> Any:
    ids = _ids(2, tiny.LENGTH)
    return {"input_ids": ids, "labels": ids.clone()}


def _text(config: Any) -> Any:
    ids = _ids(2, tiny.LENGTH)
    return {"input_ids": ids, "attention_mask": ids.ne(0).long(), "labels": _labels()}


def _pair(config: Any) -> Any:
    return {"input_ids": _ids(2, tiny.LENGTH), "labels": _ids(2, 8)}


def _image(config: Any) -> Any:
    import torch

    if config.model_type == "imagegpt":
        return {"input_ids": _ids(2, 16), "labels": _labels()}
    size = getattr(getattr(config, "vision_config", config), "image_size", 64)
    size = size[0] if isinstance(size, (list, tuple)) else size
    return {"pixel_values": torch.randn(2, 3, min(size, 64), min(size, 64)), "labels": _labels()}


def _video(config: Any) -> Any:
    import torch

    return {"pixel_values": torch.randn(2, config.num_frames, 3, tiny.IMAGE, tiny.IMAGE), "labels": _labels()}


def _sound(config: Any) -> Any:
    import torch

    if config.model_type == "whisper":
        return {"input_features": torch.randn(2, config.num_mel_bins, 32), "labels": _labels()}
    if config.model_type == "audio-spectrogram-transformer":
        return {"input_values": torch.randn(2, config.max_length, config.num_mel_bins), "labels": _labels()}
    return {"input_values": torch.randn(2, 800), "labels": _labels()}
