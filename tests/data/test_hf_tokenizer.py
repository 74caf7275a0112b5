"""Tokenizers from files, made on the spot."""

import base64
import json
import random
import re
from itertools import groupby

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from configs.schema import ConfigError
from data.hf_tokenizer import KIMI_OFFSETS
from data.parse import parse_conversation
from data.render import KimiRenderer
from data.tasks import TASKS, make_problem
from data.tokenizer import SPECIAL_NAMES, byte_characters, load_tokenizer

CORPUS = ["the quick brown fox isn't here", "The THEATRE there's 12345 words", "漢字かな", "a\n\n  b\tc", "ünïcödé"] * 4
TEXTS = [
    *CORPUS[:5],
    "",
    " ",
    "\r\n x",
    "<|im_end|>[EOS]<s></s><unk>",
    "word<|im_user|>",
    "🙂 99 ‍",
    "don't DON'T 漢a",
    "".join(map(chr, range(1, 400))),
]


def trained_bpe(size=400):
    """A byte-level BPE as the library trains it, with two added tokens of its own."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "<|im_end|>"]
        ),
    )
    return tokenizer


def trained_unigram():
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=80, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    )
    return tokenizer


def tiktoken_file(path):
    """Ranks that a small trained BPE implies: its bytes, then its merges in order."""
    byte_of = {char: i for i, char in enumerate(byte_characters())}
    merges = json.loads(trained_bpe().to_str())["model"]["merges"]
    tokens = [bytes([i]) for i in range(256)]
    tokens += dict.fromkeys(bytes(byte_of[c] for c in "".join(pair)) for pair in merges)
    tokens = list(dict.fromkeys(tokens))
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    return tokens


@pytest.fixture(params=["bpe", "unigram", "tiktoken"])
def loaded(request, tmp_path):
    path = tmp_path / "tokenizer.json"
    if request.param == "tiktoken":
        tiktoken_file(path)
    else:
        {"bpe": trained_bpe, "unigram": trained_unigram}[request.param]().save(str(path))
    return request.param, load_tokenizer(str(path))


def test_plain_text_has_no_special_ids(loaded):
    kind, tok = loaded
    assert set(tok.special) == set(SPECIAL_NAMES) and len(set(tok.special.values())) == len(SPECIAL_NAMES)
    unknown = {i for i, name in tok.names.items() if name == "<unk>"}
    controls = set(tok.names) - unknown  # a unigram model gives <unk> for what it cannot spell
    for text in TEXTS:
        ids = tok.encode(text)
        assert not controls & set(ids)
        assert [ids] == [list(e) for e in tok.encode_many([text])]
        if kind != "unigram":
            assert tok.decode(ids) == text
            assert tok.byte_lengths[ids].sum() == len(text.encode())
    assert tok.decode([tok.eos_id]) == "<|im_end|>" and max(tok.special.values()) < tok.vocab_size
    assert not tok.byte_lengths[list(tok.names)].any()


def test_rendering_and_parsing(loaded):
    kind, tok = loaded
    word = "the fox <|im_end|> " if kind != "unigram" else "the fox"
    messages = [{"role": "user", "content": word}, {"role": "assistant", "content": "there", "reasoning_content": "the"}]
    (row,) = KimiRenderer(tok).rows(messages)
    assert row.ids.count(tok.eos_id) == 2
    if kind != "unigram":
        assert parse_conversation(row.ids, tok) == (messages, [])


def test_masks_do_not_depend_on_the_tokenizer(tmp_path):
    """The trained text of every built-in problem is the same under bytes, a trained BPE and tiktoken ranks."""
    trained_bpe().save(str(tmp_path / "bpe.json"))
    tiktoken_file(tmp_path / "ranks")
    loaded = [load_tokenizer(name) for name in ("bytes", str(tmp_path / "bpe.json"), str(tmp_path / "ranks"))]
    for task in TASKS:
        problem = make_problem(task, 0, 0, 5)
        texts = []
        for tok in loaded:
            rows = KimiRenderer(tok).rows(problem.messages, problem.tools)
            texts.append(
                [
                    [
                        (tok.decode([i for i, _ in run]), weight)
                        for weight, run in groupby(zip(row.ids, row.weights), key=lambda pair: pair[1])
                    ]
                    for row in rows
                ]
            )
        assert texts[0] == texts[1] == texts[2]


def test_saved_files_read_back_the_same(loaded, tmp_path):
    _, tok = loaded
    tok.save(tmp_path / "out")
    again = load_tokenizer(str(tmp_path / "out"))
    assert again.fingerprint() == tok.fingerprint() and again.special == tok.special
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in CORPUS[:5]:
        assert theirs.encode(text, add_special_tokens=False).ids == tok.encode(text)
    for name, i in tok.special.items():
        assert theirs.token_to_id(name) == i and i in theirs.encode(f"the {name} fox").ids


def test_the_library_agrees_about_plain_text(tmp_path):
    theirs = trained_bpe()
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(str(tmp_path))
    for text in TEXTS:
        if "<" not in text:
            assert ours.encode(text) == theirs.encode(text).ids


def test_added_runs_of_spaces_are_text(tmp_path):
    """As in GPT-NeoX and Phi: added behind the pieces and not special, so the library finds them in text."""
    theirs = trained_bpe()
    theirs.add_tokens([tokenizers.AddedToken(run, normalized=False, special=False) for run in ("\n\n", "    ", "  ", "\t\t")])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(str(tmp_path))
    for text in ("the fox\n\n    quick  the\t\tbrown", "    ", "\n    the", "   x"):
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids and ours.decode(ids) == text and ours.byte_lengths[ids].sum() == len(text.encode())
    assert ours.token_bytes(theirs.encode("    the").ids) == b"    the"


def test_added_runs_of_spaces_keep_their_ids_beside_a_list_of_pieces(tmp_path):
    """Behind control tokens that text cannot reach, one of them a piece; "\\n" is a piece too."""
    theirs = trained_unigram()
    size, piece = theirs.get_vocab_size(), theirs.id_to_token(20)
    theirs.add_special_tokens(["<extra>", piece])
    theirs.add_tokens([tokenizers.AddedToken(run, normalized=False) for run in ("\n", "\t\t")])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(str(tmp_path))
    for text in ("a\nb\t\tc", "\n", "a\n\n  b\tc"):
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids and ours.decode(ids) == theirs.decode(ids)
    assert theirs.token_to_id("\n") < size < theirs.token_to_id("\t\t")
    assert not {size, 20} & set(ours.encode(f"<extra>{piece}"))


@pytest.mark.parametrize("scheme", ["first", "never", "always"])
def test_prefixes_as_the_saved_file_has_them(scheme, tmp_path):
    """SentencePiece files may put a space before a text's first word, or before every piece between control tokens."""
    made = trained_unigram()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    made.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(str(tmp_path))
    ours.save(tmp_path / "out")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    (row,) = KimiRenderer(ours).rows([{"role": "user", "content": "the quick"}, {"role": "assistant", "content": " brown"}])
    text = "".join(ours.decode([i]) if i in ours.names else theirs.id_to_token(i).replace("\u2581", " ") for i in row.ids)
    if scheme == "always":
        text = re.sub("(?<=>) ", "", text)  # the prefix of a piece
    assert theirs.encode(text, add_special_tokens=False).ids == list(row.ids)
    if scheme != "always":
        assert ours.decode(ours.encode(" the fox")) == " the fox"


def spaces_as_pieces(path, **model):
    """As Gemma has it: runs of spaces, spelled U+2581, and marks are added tokens and results of merges too."""
    pieces = ["\u2581", *"abc<>t", "\u2581" * 2, "\u2581" * 4, "ab", "<t", "<t>", "a<t>"]
    merges = [["\u2581"] * 2, ["\u2581" * 2] * 2, ["a", "b"], ["<", "t"], ["<t", ">"], ["a", "<t>"]]
    added = [
        {
            "id": pieces.index(name),
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,
        }
        for name in ("\u2581" * 2, "\u2581" * 4, "<t>")
    ]
    path.write_text(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": added,
                "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
                "pre_tokenizer": None,
                "post_processor": None,
                "decoder": {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                "model": {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges} | model,
            }
        )
    )
    return {piece: i for i, piece in enumerate(pieces)}


@pytest.mark.parametrize("model", [{}, {"merges": ["\u2581 \u2581", "\u2581\u2581 \u2581\u2581", "a b", "< t", "<t >", "a <t>"]}])
def test_added_tokens_may_be_merged(tmp_path, model):
    """Runs of spaces stay text; of a mark, and of what is made of it, nothing is left."""
    known = spaces_as_pieces(tmp_path / "tokenizer.json", **model)
    tok, theirs = load_tokenizer(str(tmp_path)), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("a  b", "    ab   c", " "):
        assert tok.encode(text) == theirs.encode(text).ids and tok.decode(tok.encode(text)) == text
        assert tok.byte_lengths[tok.encode(text)].sum() == len(text)
    assert known["\u2581" * 2] in tok.encode("a  b") and known["\u2581" * 2] not in tok.names
    assert [tok._pieces[i] for i in tok.encode("a<t>b")] == ["a", "<t", ">", "b"] and known["<t>"] in tok.names


def test_a_library_that_panics_is_one_sentence(tmp_path):
    spaces_as_pieces(tmp_path / "tokenizer.json", continuing_subword_prefix="#" * 6)
    with pytest.raises(ConfigError, match="tokenizer.json is not a Hugging Face tokenizer.json that can be used here: "):
        load_tokenizer(str(tmp_path))


def merge_by_rank(piece, ranks):
    """The definition of tiktoken's merging, written out: join the neighbours of lowest joint rank, leftmost first."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    if piece in ranks:
        return [ranks[piece]]
    while True:
        joint = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
        if not joint:
            return [ranks[part] for part in parts]
        i = min(joint)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_tiktoken_merges_by_rank(tmp_path):
    tokens = tiktoken_file(tmp_path / "ranks")
    tok = load_tokenizer(str(tmp_path / "ranks"))
    ranks = {token: i for i, token in enumerate(tokens)}
    rng = random.Random(0)
    alphabet = sorted({c for text in CORPUS for c in text if c.islower() and c.isascii()})
    for _ in range(500):
        word = "".join(rng.choice(["the", "qu", "ick", "ea", *alphabet]) for _ in range(rng.randint(1, 9)))
        assert tok.encode(word) == merge_by_rank(word.encode(), ranks)


def test_kimi_ids_and_split(tmp_path):
    tokens = tiktoken_file(tmp_path / "ranks")
    tok = load_tokenizer(str(tmp_path / "ranks"))
    assert tok.vocab_size == len(tokens) + 256
    assert {name: i - len(tokens) for name, i in tok.special.items()} == KIMI_OFFSETS
    pieces = [piece for piece, _ in tok._plain.pre_tokenizer.pre_tokenize_str("It's 12345漢字kana  x!!\n y")]
    text = ["".join(map(chr, bytes(byte_characters().index(c) for c in piece))).encode("latin1").decode() for piece in pieces]
    assert text == ["It's", " ", "123", "45", "漢字", "kana", " ", " x", "!!\n", " y"]


@pytest.mark.parametrize(
    "content, words",
    [
        (b"{}", "is not a Hugging Face tokenizer.json"),
        (b"hello world", "line 1 is no tiktoken line"),
        (b"AA== 1\n", "line 1 has rank 1, expected 0"),
        (b"AA== 0\n", "has no token for byte 1"),
    ],
)
def test_files_that_are_none(tmp_path, content, words):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_tokenizer(str(tmp_path / "x"))
