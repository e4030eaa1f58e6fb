"""Prompts to ids, against transformers' tokenizers and WanPipeline's cleaning."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from hbxt_compress.errors import ArtifactError, UsageError
from hbxt_compress.runtime.text import PromptTokenizer, clean_prompt
from hbxt_compress.torchvision_ops import mend_torchvision
from tests.fake_artifact import TEXT_LENGTH, make_artifact

mend_torchvision()
from diffusers.pipelines.wan.pipeline_wan import prompt_clean  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

PROMPTS = [
    "",
    "a red circle moving right on a black background",
    "  a   red\n\tcircle  ",
    "A cat &amp; a dog, 5 &lt; 6; it&#39;s &amp;amp; late",
    "“curly” ‘quotes’ and the man’s hat",
    "ﬁne ﬂow, ＦＵＬＬ　width！",
    "cafe\u0301 na\u00efve",
    "bell\x07 and\x0bfeed\x0c end\u2028line\ufeff",
    "一只猫在厨房里烤蛋糕",
    "a very long prompt " * 40,
]


@pytest.fixture(scope="module")
def word_level(tmp_path_factory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("text") / "artifact") / "tokenizer"


@pytest.fixture(scope="module")
def unigram(tmp_path_factory) -> Path:
    """A tokenizer built like T5's: pieces with scores, a word mark, the end token last."""
    folder = tmp_path_factory.mktemp("unigram")
    words = sorted({word for prompt in PROMPTS for word in prompt.split() if word.isascii()})
    letters = sorted(
        set("".join(words)) | set("\u2581,.&<>'\"!0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    )
    scored = [(letter, -9.0) for letter in letters] + [(f"\u2581{word}", -3.0) for word in words]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [pair for pair in scored if pair[0] not in {"<pad>"}]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": {"content": "<pad>", "__type": "AddedToken"},
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["word_level", "unigram"])
@pytest.mark.parametrize("n_tokens", [4, 8, 32])
def test_ids_equal_transformers(kind, n_tokens, request):
    folder = request.getfixturevalue(kind)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = PromptTokenizer(folder, n_tokens)
    for prompt in PROMPTS:
        expected = theirs(
            [prompt_clean(prompt)],
            padding="max_length",
            max_length=n_tokens,
            truncation=True,
            return_tensors="np",
        )
        ids, mask = ours(prompt)
        assert ids.dtype == mask.dtype == np.int64
        np.testing.assert_array_equal(ids, expected["input_ids"])
        np.testing.assert_array_equal(mask, expected["attention_mask"])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_cleaning_equals_the_pipeline_with_ftfy(prompt):
    pytest.importorskip("ftfy", reason="WanPipeline cleans with ftfy where that is installed")
    assert clean_prompt(prompt) == prompt_clean(prompt)


def test_cleaning_needs_no_ftfy():
    assert clean_prompt(" “a” man’s\n ﬁn &amp;amp; ＡＢ ") == '"a" man\'s fin & AB'


def test_wrongly_decoded_text_is_left_alone():
    """The one part of ftfy left out, on purpose: what a prompt means does not hang on a guess."""
    assert clean_prompt("schÃ¶n") == "schÃ¶n"


def test_the_end_token_survives_a_cut(word_level):
    ids, mask = PromptTokenizer(word_level, TEXT_LENGTH)("red " * 100)
    assert ids.shape == mask.shape == (1, TEXT_LENGTH)
    assert mask.all()
    assert ids[0, -1] == 1


def test_an_empty_prompt_is_its_end_token(word_level):
    ids, mask = PromptTokenizer(word_level, TEXT_LENGTH)("")
    assert ids.tolist() == [[1] + [0] * (TEXT_LENGTH - 1)]
    assert mask.sum() == 1


def test_a_prompt_is_text(word_level):
    with pytest.raises(UsageError, match="got list"):
        PromptTokenizer(word_level, TEXT_LENGTH)(["a", "b"])


def test_a_damaged_tokenizer(tmp_path, word_level):
    with pytest.raises(ArtifactError, match="no readable tokenizer"):
        PromptTokenizer(tmp_path, 8)
    (tmp_path / "tokenizer.json").write_text((word_level / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    with pytest.raises(ArtifactError, match=r"'\[PAD\]' is not in the vocabulary"):
        PromptTokenizer(tmp_path, 8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", r"tokenizer_config\.json: not a JSON object"),
        ('{"pad_token": 3}', "padding token 3 is not in the vocabulary"),
        ('{"pad_token": {}}', "padding token None is not"),
        ('{"pad_token": "<pad>", "padding_side": "up"}', "left or right: padding_side: 'up'"),
        ('{"pad_token": "<pad>", "truncation_side": []}', "truncation_side: "),
        ("[" * 50_000, "no readable tokenizer .nested too deeply"),
    ],
)
def test_a_configuration_that_makes_no_sense(tmp_path, word_level, config, message):
    (tmp_path / "tokenizer.json").write_text((word_level / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ArtifactError, match=message):
        PromptTokenizer(tmp_path, 8)


def test_what_tokenizers_panics_at_is_a_damaged_file(tmp_path, word_level, monkeypatch):
    class PanicException(BaseException):
        """As the Rust code's, which cannot be imported."""

    def panics(path):
        raise PanicException("index out of bounds\nnote: run with RUST_BACKTRACE=1")

    monkeypatch.setattr(Tokenizer, "from_file", panics)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: .* it \(index out of bounds\)$"):
        PromptTokenizer(word_level, 8)
    monkeypatch.setattr(Tokenizer, "from_file", lambda path: (_ for _ in ()).throw(SystemExit(3)))
    with pytest.raises(SystemExit):
        PromptTokenizer(word_level, 8)


def test_a_template_of_tokens_that_are_not_there_panics_in_silence(tmp_path, word_level, capfd):
    document = json.loads((word_level / "tokenizer.json").read_text())
    document["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: tokenizers cannot use it"):
        PromptTokenizer(tmp_path, 8)
    assert capfd.readouterr() == ("", "")
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"
