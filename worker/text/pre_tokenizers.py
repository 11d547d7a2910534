"""Pre-tokenizers of byte-level vocabularies, by `tokenizer.ggml.pre`: patterns of words.

The patterns are those of the models' own tokenizers (OpenAI's tiktoken for gpt-2 and gpt-4o, the
tokenizer.json of the others); `default` is llama.cpp's, for files older than the key. They apply in
order, each within the splits of the previous one; unmatched text is a split too. The names are
llama.cpp's for causal language models with byte-level vocabularies.
"""

from dataclasses import dataclass

from worker.errors import ModelLoadFailed

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT, _DIGITS, _UP_TO_3_DIGITS = r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SENTENCE = r" ?[^(\s|.,!?\u2026\u3002\uFF0C\u3001\u0964\u06D4\u060C)]+"


def _cl100k(digits: str, letters: str = _LETTERS, symbols: str = _SYMBOLS, spaces: str = _SPACES) -> str:
    """OpenAI's cl100k: contractions, letters after at most one other character, digits, symbols."""
    return "|".join((_CONTRACTIONS, letters, digits, symbols, spaces))


def _o200k(digits: str, end: str = rf"{_CONTRACTIONS}?", upper: str = _UPPER, lower: str = _LOWER) -> str:
    """OpenAI's o200k: words also end between a lower-case and an upper-case letter."""
    before = r"[^\r\n\p{L}\p{N}]?"
    words = (f"{before}{upper}*{lower}+{end}", f"{before}{upper}+{lower}*{end}")
    return "|".join((*words, digits, r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _SPACES))


def _deepseek3(symbols: str = r" ?[\p{P}\p{S}]+[\r\n]*", spaces: str = _SPACES) -> str:
    """The last pattern of DeepSeek-V3: letters with their marks, punctuation and symbols."""
    return "|".join(
        (
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
            r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
            symbols,
            spaces,
        )
    )


# DeepSeek's list of cased letters, of an older Unicode version, without mathematical letters.
_DEEPSEEK_CASED = (
    r"A-Za-z\u00B5\u00C0-\u00D6\u00D8-\u00F6\u00F8-\u01BA\u01BC-\u01BF\u01C4-\u0293\u0295-\u02AF\u0370-\u0373"
    r"\u0376\u0377\u037B-\u037D\u037F\u0386\u0388-\u038A\u038C\u038E-\u03A1\u03A3-\u03F5\u03F7-\u0481"
    r"\u048A-\u052F\u0531-\u0556\u10A0-\u10C5\u13A0-\u13F5\u13F8-\u13FD\u1C90-\u1CBA\u1CBD-\u1CBF\u1D00-\u1D2B"
    r"\u1D6B-\u1D77\u1D79-\u1D9A\u1E00-\u1F15\u1F18-\u1F1D\u1F20-\u1F45\u1F48-\u1F4D\u1F50-\u1F57\u1F59\u1F5B"
    r"\u1F5D\u1F5F-\u1F7D\u1F80-\u1FB4\u1FB6-\u1FBC\u1FBE\u1FC2-\u1FC4\u1FC6-\u1FCC\u1FD0-\u1FD3\u1FD6-\u1FDB"
    r"\u1FE0-\u1FEC\u1FF2-\u1FF4\u1FF6-\u1FFC\u2102\u2107\u210A-\u2113\u2115\u2119-\u211D\u2124\u2126\u2128"
    r"\u212A-\u212D\u212F-\u2134\u2139\u213C-\u213F\u2145-\u2149\u214E\u2183\u2184\u2C00-\u2C7B\u2C7E-\u2CE4"
    r"\u2CEB-\u2CEE\u2CF2\u2CF3\uA640-\uA66D\uA680-\uA69B\uA722-\uA76F\uA771-\uA787\uA78B-\uA78E\uAB70-\uABBF"
    r"\uFB00-\uFB06\uFB13-\uFB17\uFF21-\uFF3A\uFF41-\uFF5A\x{10400}-\x{1044F}\x{104B0}-\x{104D3}"
    r"\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}"
)
_CHINESE_JAPANESE = r"[\u4E00-\u9FA5\u3040-\u30FF]+"
_CHINESE_KOREAN = r"[\u0800-\u9FA5\uAC00-\uD7FF]+"
_KOREAN = r"[\uAC00-\uD7A3\u3131-\u318E]+"
_ASIAN_PUNCTUATION = r"[\uFF01\u2026\u201C\u201D\u2018\u2019\u2014\uFF1A\uFF1B\uFF0C\u3001-\u303F\uFE30-\uFE4F]+"
_BOPOMOFO = r"[\u3105-\u312F]+"
_NOT_HAN = r"&&[^\p{Han}]]"
_JAIS2_SPACES = "".join(rf"|\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))


@dataclass(frozen=True)
class PreTokenizer:
    """Split patterns, and two properties of the tokenizers that use them."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A word that is a token is encoded as that token, without merges."""
    add_bos: bool = False
    """The default of `tokenizer.ggml.add_bos_token`."""


def _named(pre_tokenizer: PreTokenizer, *names: str) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names, pre_tokenizer)


PRE_TOKENIZERS = (
    _named(PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, _DIGITS, "[0-9][0-9][0-9]")), "default")
    | _named(
        PreTokenizer((_GPT2,)),
        *("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "gigachat", "a.x-4.0", "mellum", "trillion"),
        "granite-docling",
    )
    | _named(
        PreTokenizer((_DIGIT, _GPT2)),
        *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    )
    | _named(PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")), "falcon")
    | _named(
        PreTokenizer((_cl100k(_UP_TO_3_DIGITS),), ignore_merges=True, add_bos=True),
        *("llama-bpe", "llama-v3", "llama3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    )
    | _named(PreTokenizer((_cl100k(_UP_TO_3_DIGITS),)), "dbrx", "smaug-bpe", "chatglm-bpe", "glm4")
    | _named(PreTokenizer((_cl100k(_UP_TO_3_DIGITS, spaces=rf"\s*[\r\n]+{_JAIS2_SPACES}|\s"),)), "jais-2")
    | _named(
        PreTokenizer((_cl100k(_DIGIT),)),
        *("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "solar-open", "grok-2", "kormo"),
    )
    | _named(
        PreTokenizer((_cl100k(_DIGIT, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),)),
        "qwen35",
    )
    | _named(PreTokenizer(("|".join((_LETTERS, _DIGIT, _SYMBOLS, _SPACES)),)), "ufakzeka")
    | _named(PreTokenizer((r"[^\n]+|[\n]+", _cl100k(_DIGIT))), "laguna")
    | _named(PreTokenizer((_UP_TO_3_DIGITS, _cl100k(_DIGITS)), ignore_merges=True), "minicpm5")
    | _named(PreTokenizer((_cl100k(_DIGIT, symbols=r" ?[^\s\p{L}\p{N}\r\n]+"),)), "seed-coder")
    | _named(
        PreTokenizer((_cl100k(_DIGIT, spaces=r"\s*[\r\n]|\s+(?!\S)|\s+"),)),
        *("bailingmoe", "bailingmoe2", "llada-moe"),
    )
    | _named(
        PreTokenizer(
            (
                _cl100k(
                    _DIGIT,
                    r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                    r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
                    r"\s*[\r\n]|\s+(?!\S)|\s+",
                ),
            )
        ),
        "exaone-moe",
    )
    | _named(PreTokenizer((_o200k(_UP_TO_3_DIGITS),)), "gpt-4o", "llama4", "kanana2", "minimax-m2", "talkie")
    | _named(PreTokenizer((_o200k(_DIGIT, end=""),), ignore_merges=True, add_bos=True), "tekken")
    | _named(
        PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _o200k(_UP_TO_3_DIGITS))),
        *("tiny_aya", "cohere2moe"),
    )
    | _named(
        PreTokenizer(
            (
                "|".join((_KOREAN, _ASIAN_PUNCTUATION, _BOPOMOFO, _CHINESE_JAPANESE)),
                _o200k(_DIGIT),
            ),
            ignore_merges=True,
        ),
        "youtu",
    )
    | _named(
        PreTokenizer(
            (
                r"\p{Han}+|"
                + _o200k(_UP_TO_3_DIGITS, upper=_UPPER[:-1] + _NOT_HAN, lower=_LOWER[:-1] + _NOT_HAN).replace("/", ""),
            )
        ),
        "kimi-k2",
    )
    | _named(
        PreTokenizer(
            (
                "[\r\n]",
                rf"\s?[{_DEEPSEEK_CASED}]+",
                r"\s?[!-/:-~\uFF01-\uFF0F\uFF1A-\uFF5E\u2018-\u201F\u3000-\u3002]+",
                r"\s+$",
                _CHINESE_KOREAN,
                _DIGITS,
            )
        ),
        "deepseek-llm",
    )
    | _named(PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE_KOREAN, _DIGIT)), "deepseek-coder")
    | _named(
        PreTokenizer((_UP_TO_3_DIGITS, _CHINESE_JAPANESE, _deepseek3())),
        *("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
    )
    | _named(
        PreTokenizer(
            (
                _UP_TO_3_DIGITS,
                _CHINESE_JAPANESE,
                _deepseek3(r" ?[\p{P}\p{S}]+", r"[\r\n]|\s+(?!\S)|\s+"),
                _DIGIT,
            )
        ),
        "spark2_5",
    )
    | _named(PreTokenizer((_SENTENCE,)), "bloom", "poro-chat", "gpt3-finnish")
    | _named(PreTokenizer((_SENTENCE, _DIGIT)), "viking")
    | _named(PreTokenizer((_DIGITS, r"(?=(\d{3})+(?!\d))")), "superbpe")
    | _named(
        PreTokenizer(
            (
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                _DIGIT,
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            add_bos=True,
        ),
        "chameleon",
    )
)


def pre_tokenizer(pre: str) -> PreTokenizer:
    """Return the pre-tokenizer of a name. Raises ModelLoadFailed if it is unknown."""
    if pre not in PRE_TOKENIZERS:
        what, expected = f"the pre-tokenizer {pre[:60]!r} is unknown", "one of " + ", ".join(PRE_TOKENIZERS)
        raise ModelLoadFailed(what, "tokenizer.ggml.pre", expected)
    return PRE_TOKENIZERS[pre]
