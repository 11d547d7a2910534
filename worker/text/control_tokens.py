"""Control tokens of a vocabulary by name and by metadata, and which of them end an answer.

Files type some of them NORMAL or USER_DEFINED, so the type alone decides neither. The names and
rules of end tokens are llama.cpp's. Read next: vocabulary.py, which applies them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

END_NAMES = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<|endoftext|>"),
        *("<|eom_id|>", "<|end_of_text|>", "<end_of_turn>", "<end_of_utterance>", "<turn|>", "<|tool_response>"),
        *("</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~[", "<｜end▁of▁sentence｜>"),
    )
)
# fill-in-the-middle tokens that end an answer: role → names, used if the metadata names no token
_FIM_END_NAMES: Mapping[str, Sequence[str]] = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
_OTHER_NAMES = (
    # fill-in-the-middle tokens that don't end an answer
    *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>"),
    *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>"),
    *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>"),
    *("<|prefix|>", "<|suffix|>", "<|middle|>"),
    # beginnings of texts and turns
    *("<s>", "<bos>", "<unk>", "<pad>", "<mask>", "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>"),
    *("<|im_start|>", "<|im_sep|>", "<start_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<｜User｜>", "<｜Assistant｜>"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"),  # harmony
)
CONTROL_NAMES = END_NAMES.union(_OTHER_NAMES, *_FIM_END_NAMES.values())
"""Names of control tokens, whatever their type."""

_END_ROLES = ("eos", "eot", "eom")
ROLES = (
    *_END_ROLES,
    *_FIM_END_NAMES,
    *("bos", "unknown", "padding", "seperator", "mask", "fim_pre", "fim_suf", "fim_mid", "prefix", "suffix", "middle"),
)
"""Roles for which metadata may name a token: `tokenizer.ggml.{role}_token_id`."""

_LOOKS_CONTROL = re.compile("<[|｜]/?\\w[^\\s<>\0]*[|｜]>(?=\0)")


def names_like_control(tokens: Iterable[str]) -> list[str]:
    """Return the texts of the forms `<|name|>` and `<｜name｜>` that tokens are or end with."""
    return _LOOKS_CONTROL.findall("\0".join((*tokens, "")))


def end_ids(roles: Mapping[str, int], ids: Mapping[str, int]) -> frozenset[int]:
    """Return the ids of the tokens that end an answer; `ids` has those of all names."""
    ends = {roles[role] for role in _END_ROLES if role in roles}
    ends |= {ids[name] for name in END_NAMES if name in ids}
    for role, names in _FIM_END_NAMES.items():
        ends |= {roles[role]} if role in roles else {ids[name] for name in names if name in ids}
    has = {name for name in END_NAMES if ids.get(name) in ends}
    if has & {"<|call|>", "<|calls|>"} and has & {"<|return|>", "<|flush|>"}:
        ends.discard(ids.get("<|end|>", -1))  # harmony: it closes a message, not the answer
    if "<|tool_response>" in has:
        ends.discard(ids.get("</s>", -1))  # Gemma 4: a tag of HTML
    return frozenset(ends)
