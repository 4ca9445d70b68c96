"""What leaves for the Hub, and what reads a saved folder: pipelines, sentence-transformers. The Hub is a stand-in."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers 5", minversion="5.0")

import fxquant.huggingface  # noqa: E402, F401 - registers the method
from fxquant.huggingface import FxQuantConfig  # noqa: E402 - it needs transformers
from tests.huggingface.models import MODELS, SIZES, TOKENS  # noqa: E402

transformers.logging.disable_progress_bar()
WORDS = {"[PAD]": 0, "<s>": 1, "</s>": 2, "[UNK]": 3} | {f"w{i}": i for i in range(4, 200)}


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel(WORDS, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def quantized(folder, model, kind):
    """Return the quantized form of a float model."""
    model.save_pretrained(folder / "float")
    return kind.from_pretrained(folder / "float", quantization_config=FxQuantConfig())


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A quantized GPT-2, and the folder that it was saved to with its tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    model = quantized(folder, MODELS["GPT-2"][0](), transformers.GPT2LMHeadModel)
    model.save_pretrained(folder / "quantized")
    tokenizer().save_pretrained(folder / "quantized")
    return model, folder / "quantized"


def test_push_to_hub_uploads_what_loads_again(gpt2, tmp_path, monkeypatch):
    made, model = [], gpt2[0]

    def create_commit(repo_id, operations, **_):
        for file in operations:
            content = file.path_or_fileobj
            data = content if isinstance(content, bytes) else Path(content).read_bytes()
            (tmp_path / file.path_in_repo).write_bytes(data)
        made.append(repo_id)

    def create_repo(repo_id, **_):
        return SimpleNamespace(repo_id=repo_id)

    hub = SimpleNamespace(create_repo=create_repo, create_commit=create_commit)
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda *_, **__: hub)
    card = SimpleNamespace(save=lambda path: Path(path).write_text("a card"))  # else the Hub is asked for one
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: card)
    model.push_to_hub("somebody/gpt2-int8")
    assert made == ["somebody/gpt2-int8"]
    again, x = transformers.GPT2LMHeadModel.from_pretrained(tmp_path), torch.tensor([[5, 6, 7]])
    assert again.hf_quantizer.record.sites
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)


def test_a_pipeline_loads_a_folder(gpt2):
    model, folder = gpt2
    generate = transformers.pipeline("text-generation", str(folder))
    options = {"max_new_tokens": 4, "do_sample": False}
    (made,) = generate("w5 w9 w17", return_tensors=True, **options)
    prompt = torch.tensor([[5, 9, 17]])
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert made["generated_token_ids"] == expected[0].tolist()


def test_sentence_transformers_load_a_folder(tmp_path):
    sentences = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    config = transformers.BertConfig(**SIZES, **TOKENS, vocab_size=200, max_position_embeddings=64)
    model = quantized(tmp_path, transformers.BertModel(config), transformers.AutoModel)
    model.save_pretrained(tmp_path / "quantized")
    tokenizer().save_pretrained(tmp_path / "quantized")
    encoder = sentences.SentenceTransformer(str(tmp_path / "quantized"), device="cpu")
    got = encoder.encode(["w5 w9 w17"], convert_to_tensor=True)
    with torch.no_grad():
        expected = model(torch.tensor([[5, 9, 17]])).last_hidden_state.mean(1)
    assert torch.allclose(got, expected, atol=1e-5)  # a mean of floats
