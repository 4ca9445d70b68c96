"""The tutorial's word language model: its text, training, evaluation, and the demo from end to end."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from word_language_model import (
    Corpus,
    Dictionary,
    TrainingConfig,
    WordLanguageModel,
    WordLanguageModelError,
    build_folder,
    evaluate,
    generate,
    infer_sizes,
    load_checkpoint,
    save_checkpoint,
    state_dict_bytes,
    to_text,
    torch_threads,
    train,
    train_or_load,
)
from word_language_model.__main__ import main
from word_language_model.demo import find_model
from word_language_model.options import token_count
from word_language_model.stdlib_text import find_sources, split_line

ROOT = Path(__file__).parents[2]
TINY = TrainingConfig(embedding_size=16, hidden_size=16, layers=2, batch=4, bptt=10, epochs=3)


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing from a second thread, and wait for it where other work has the core."""
    with torch_threads(1):
        yield


def write_corpus(folder: Path, train_text: str, valid_text: str = "a\n", test_text: str = "a\n") -> Path:
    for part, text in (("train", train_text), ("valid", valid_text), ("test", test_text)):
        (folder / f"{part}.txt").write_text(text, encoding="utf8")
    return folder


def little_model(words: int = 30, seed: int = 0) -> WordLanguageModel:
    torch.manual_seed(seed)
    return WordLanguageModel(words, embedding_size=8, hidden_size=12, layers=2).eval()


def write_sources(root: Path, files: int = 60) -> Path:
    """Python files enough for all three parts; `only_i` occurs once, `common` everywhere."""
    for i in range(files):
        path = root / f"package_{i % 3}" / f"module_{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"only_{i} = common(1, 2)\n\n" + "common = common + 1  # again\n" * 20)
    return root


class TestCorpus:
    def test_words_are_numbered_by_first_appearance_over_train_valid_test(self, tmp_path):
        corpus = Corpus.from_folder(write_corpus(tmp_path, "b a b\n\na\n", "c a\n", "d b\n"))
        assert corpus.dictionary.words == ["b", "a", "<eos>", "c", "d"]
        assert corpus.train.tolist() == [0, 1, 0, 2, 2, 1, 2]
        assert corpus.valid.tolist() == [3, 1, 2]
        assert corpus.test.tolist() == [4, 0, 2]

    def test_a_known_word_keeps_its_number(self):
        dictionary = Dictionary(["x", "y"])
        assert [dictionary.add(word) for word in ("y", "z", "x", "z")] == [1, 2, 0, 2]
        assert len(dictionary) == 3

    def test_digest_tells_training_texts_apart(self, tmp_path):
        first = Corpus.from_folder(write_corpus(tmp_path, "a b\n")).digest()
        assert Corpus.from_folder(tmp_path).digest() == first
        assert Corpus.from_folder(write_corpus(tmp_path, "a b b\n")).digest() != first

    def test_a_missing_folder_is_named(self, tmp_path):
        with pytest.raises(WordLanguageModelError, match=r"no folder at .*nowhere.*train\.txt"):
            Corpus.from_folder(tmp_path / "nowhere")

    def test_missing_files_are_named(self, tmp_path):
        (tmp_path / "train.txt").write_text("a b\n")
        with pytest.raises(WordLanguageModelError, match=r"lacks valid\.txt, test\.txt"):
            Corpus.from_folder(tmp_path)

    def test_an_empty_file_is_named(self, tmp_path):
        with pytest.raises(WordLanguageModelError, match=r"valid\.txt holds no text"):
            Corpus.from_folder(write_corpus(tmp_path, "a b\n", valid_text=""))

    def test_bytes_that_are_no_text_are_reported(self, tmp_path):
        write_corpus(tmp_path, "a b\n")
        (tmp_path / "test.txt").write_bytes(b"a \xff\n")
        with pytest.raises(WordLanguageModelError, match=r"test\.txt is not UTF-8"):
            Corpus.from_folder(tmp_path)


class TestStdlibText:
    def test_a_line_becomes_words_and_signs(self):
        assert split_line("  x_1 += f(a.b, 27) != 'no'\n") == [
            *("x_1", "+=", "f", "(", "a", ".", "b", ",", "27", ")", "!=", "'", "no", "'")
        ]  # fmt: skip

    def test_this_python_gives_a_corpus_within_its_limits(self, tmp_path):
        corpus = Corpus.from_folder(build_folder(tmp_path, max_words=150_000, max_vocabulary=500))
        words = corpus.dictionary.words
        assert len(words) <= 500
        assert {"<unk>", "<eos>", "def", "self"} <= set(words)
        assert len(corpus.train) + len(corpus.valid) + len(corpus.test) >= 150_000
        assert len(corpus.train) > max(len(corpus.valid), len(corpus.test))

    def test_rare_words_become_unknown_and_the_vocabulary_is_exact(self, tmp_path):
        folder = build_folder(tmp_path / "cache", max_vocabulary=8, root=write_sources(tmp_path / "source"))
        corpus = Corpus.from_folder(folder)
        assert len(corpus.dictionary) == 8
        assert not [word for word in corpus.dictionary.words if word.startswith("only_")]
        assert "<unk>" in corpus.dictionary.words

    def test_each_file_is_in_one_part_and_the_order_is_the_same_again(self, tmp_path):
        root = write_sources(tmp_path / "source")
        folder = build_folder(tmp_path / "cache", max_vocabulary=1000, root=root)
        seen = [word for part in ("train", "valid", "test") for word in (folder / f"{part}.txt").read_text().split()]
        marks = [word for word in seen if word.startswith("only_")]
        assert sorted(marks) == sorted(f"only_{i}" for i in range(60))
        again = build_folder(tmp_path / "other", max_vocabulary=1000, root=root)
        for part in ("train", "valid", "test"):
            assert (again / f"{part}.txt").read_text() == (folder / f"{part}.txt").read_text()

    def test_a_built_folder_is_not_built_again(self, tmp_path):
        root = write_sources(tmp_path / "source")
        folder = build_folder(tmp_path / "cache", root=root)
        (folder / "train.txt").write_text("kept\n")
        assert build_folder(tmp_path / "cache", root=root) == folder
        assert (folder / "train.txt").read_text() == "kept\n"
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]

    def test_installed_packages_and_tests_are_left_out(self, tmp_path):
        root = write_sources(tmp_path, files=3)
        for name in ("site-packages", "test"):
            (root / name).mkdir()
            (root / name / "module.py").write_text("x\n")
        assert sorted(path.name for path in find_sources(root)) == ["module_0.py", "module_1.py", "module_2.py"]

    def test_a_python_without_sources_is_reported(self, tmp_path):
        with pytest.raises(WordLanguageModelError, match=r"only 0 words of Python source.*--data"):
            build_folder(tmp_path / "cache", root=tmp_path)


class TestCheckpoint:
    def test_sizes_are_read_off_the_shapes(self):
        model = WordLanguageModel(30, embedding_size=8, hidden_size=12, layers=3)
        assert infer_sizes(model.state_dict()) == {
            "words": 30, "embedding_size": 8, "hidden_size": 12, "layers": 3
        }  # fmt: skip

    def test_keys_are_the_documents(self):
        assert {key.split(".")[0] for key in little_model().state_dict()} == {"encoder", "rnn", "decoder"}

    def test_a_model_comes_back_bit_for_bit(self, tmp_path):
        model = little_model()
        save_checkpoint(model, tmp_path / "deep" / "model.safetensors")
        loaded = load_checkpoint(tmp_path / "deep" / "model.safetensors")
        assert not loaded.training
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.safetensors"]

    def test_float16_is_widened(self, tmp_path):
        state = {key: value.half() for key, value in little_model().state_dict().items()}
        save_file(state, tmp_path / "half.safetensors")
        loaded = load_checkpoint(tmp_path / "half.safetensors").state_dict()
        assert all(value.dtype == torch.float32 and torch.equal(value, state[key]) for key, value in loaded.items())

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(WordLanguageModelError, match=r"no checkpoint at .*gone\.safetensors"):
            load_checkpoint(tmp_path / "gone.safetensors")

    def test_a_file_of_another_kind_is_refused(self, tmp_path):
        (tmp_path / "model.safetensors").write_bytes(b"no tensors here")
        with pytest.raises(WordLanguageModelError, match="not a whole safetensors file"):
            load_checkpoint(tmp_path / "model.safetensors")

    def test_another_model_is_refused(self, tmp_path):
        save_file({"layer.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
        with pytest.raises(WordLanguageModelError, match=r"does not hold a word language model.*encoder\.weight"):
            load_checkpoint(tmp_path / "model.safetensors")


class TestTraining:
    def test_training_lowers_the_loss_to_that_of_the_text(self):
        text = torch.tensor([0, 1, 2, 3, 4] * 400)
        model = train(text, 5, TINY, show_progress=False)
        result = evaluate({"it": model}, text[:200], model.init_hidden(1), show_progress=False)["it"]
        # Guessing evenly costs log 5; the text repeats itself, so that after the first words nothing is left to guess.
        assert result.loss < 0.2 * math.log(5)

    def test_same_seed_same_model_and_the_callers_dice_stay(self):
        text = torch.tensor([0, 1, 2] * 100)
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        first = train(text, 3, TINY, show_progress=False)
        assert torch.equal(torch.rand(1), expected)
        second = train(text, 3, TINY, show_progress=False)
        assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())

    def test_the_result_is_cached_by_text_and_config(self, tmp_path):
        corpus = Corpus.from_folder(write_corpus(tmp_path, "a b c\n" * 50))
        first = train_or_load(corpus, TINY, tmp_path / "cache", show_progress=False)
        (path,) = (tmp_path / "cache").iterdir()
        stamp = path.stat().st_mtime_ns
        again = train_or_load(corpus, TINY, tmp_path / "cache", show_progress=False)
        assert path.stat().st_mtime_ns == stamp
        assert torch.equal(first.decoder.weight, again.decoder.weight)
        other = TrainingConfig(**{**vars(TINY), "seed": 2})
        train_or_load(corpus, other, tmp_path / "cache", show_progress=False)
        assert len(list((tmp_path / "cache").iterdir())) == 2


class TestGeneration:
    def test_the_seed_decides(self):
        model = little_model()
        first, again, other = (generate(model, model.init_hidden(1), 0, 40, seed=seed) for seed in (1, 1, 2))
        assert first == again != other
        assert len(first) == 40
        assert set(first) <= set(range(30))

    def test_a_low_temperature_takes_the_likeliest_word(self):
        model = little_model()
        words, hidden = [4], model.init_hidden(1)
        with torch.no_grad():
            for _ in range(10):
                scores, hidden = model(torch.tensor([[words[-1]]]), hidden)
                words.append(int(scores.argmax()))
        assert generate(model, model.init_hidden(1), 4, 10, temperature=1e-4) == words[1:]

    def test_end_of_line_breaks_the_line(self):
        dictionary = Dictionary(["a", "<eos>", "b"])
        assert to_text([0, 2, 1, 1, 2, 1], dictionary) == "a b\nb"


class TestEvaluation:
    @pytest.mark.parametrize("length", [2, 25, 26, 27, 401, 430])
    def test_loss_is_that_of_the_whole_text_in_one_piece(self, length):
        model = little_model()
        text = torch.randint(30, (length,))
        with torch.no_grad():
            scores, _ = model(text[:-1].unsqueeze(1), model.init_hidden(1))
        expected = F.cross_entropy(scores.squeeze(1).double(), text[1:])
        result = evaluate({"it": model}, text, model.init_hidden(1), show_progress=False)["it"]
        assert result.tokens == length - 1
        # Each sequence's mean is rounded to float32 once, and so are the scores: 1e-6 relative is eight such roundings.
        assert result.loss == pytest.approx(expected.item(), rel=1e-6)
        assert result.perplexity == pytest.approx(math.exp(expected.item()), rel=1e-5)

    def test_models_side_by_side_get_what_they_get_alone(self):
        models = {"first": little_model(seed=1), "second": little_model(seed=2)}
        text, hidden = torch.randint(30, (300,)), little_model().init_hidden(1)
        together = evaluate(models, text, hidden, show_progress=False)
        for name, model in models.items():
            alone = evaluate({name: model}, text, hidden, show_progress=False)[name]
            assert together[name].total_loss == alone.total_loss
            assert together[name].seconds > 0
            assert together[name].ms_a_token == pytest.approx(1e3 * together[name].seconds / 299)

    @pytest.mark.parametrize("part", ["drop", "rnn"])
    def test_a_model_whose_dropout_is_on_is_refused(self, part):
        model = little_model()
        model.get_submodule(part).train()
        with pytest.raises(ValueError, match=rf"second is in training mode \({part}\); call eval"):
            evaluate({"first": little_model(), "second": model}, torch.arange(5), model.init_hidden(1))

    def test_size_is_that_of_the_file(self, tmp_path):
        torch.save(little_model().state_dict(), tmp_path / "state.pt")
        # The file's name is in the file, padded; no more than an alignment of 64 bytes a tensor comes from it.
        difference = (tmp_path / "state.pt").stat().st_size - state_dict_bytes(little_model())
        assert abs(difference) <= 64 * len(little_model().state_dict()) + 1000

    def test_the_number_of_threads_comes_back(self):
        before = torch.get_num_threads()
        with torch_threads(before + 1):
            assert torch.get_num_threads() == before + 1
        assert torch.get_num_threads() == before


class TestCommandLine:
    @pytest.fixture
    def data(self, tmp_path):
        (tmp_path / "data").mkdir()
        line = "the quick brown fox jumps over the lazy dog and runs away\n"
        return write_corpus(tmp_path / "data", line * 60, line * 5, line * 30)

    def test_from_text_to_table(self, data, tmp_path, capsys):
        target = tmp_path / "out" / "quantized.safetensors"
        arguments = ["--data", str(data), "--checkpoint", "", "--cache", str(tmp_path / "cache"), "--tokens", "all"]
        main([*arguments, "--quantized", str(target), "--words", "8"])
        shown = capsys.readouterr().out
        for word in (
            "QuantizedEmbedding",
            "DynamicQuantizedLSTM",
            "DynamicQuantizedLinear",
            "perplexity",
            "ms a token",
        ):
            assert word in shown
        rows = {line.split("  ")[0]: re.findall(r"\d+\.\d+", line) for line in shown.splitlines()}
        size, loss = (float(rows["float"][i]) / float(rows["fxquant"][i]) for i in (0, 1))
        # The weights are all but everything here, and the text is learnt: a quarter of the bytes, the same loss.
        assert size > 3.5
        assert loss == pytest.approx(1, abs=0.1)
        assert "whole test text" in shown
        assert "× smaller" in shown
        assert target.stat().st_size < 1.2e6 * float(rows["fxquant"][0])

    def test_it_trains_on_one_thread_and_gives_the_others_back(self, data, tmp_path, monkeypatch):
        def note(*_):
            threads.append(torch.get_num_threads())
            return little_model(words=12)

        threads = []
        monkeypatch.setattr("word_language_model.demo.train_or_load", note)
        with torch_threads(2):
            find_model(None, Corpus.from_folder(data), tmp_path, TINY)
            assert torch.get_num_threads() == 2
        assert threads == [1]

    def test_a_torch_without_torch_ao_has_no_such_row(self, data, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.ao.quantization", None)
        main(["--data", str(data), "--cache", str(tmp_path / "cache"), "--words", "3"])
        shown = capsys.readouterr().out
        assert "no row for torch.ao" in shown
        assert not re.search(r"^torch\.ao", shown, re.MULTILINE)
        assert re.search(r"^fxquant +\d", shown, re.MULTILINE)

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--data", "nowhere", "error: no folder at nowhere"),
            ("--checkpoint", "gone.safetensors", "error: no checkpoint at gone.safetensors"),
        ],
    )
    def test_a_missing_path_is_one_line(self, option, value, message, data, tmp_path):
        defaults = {"--data": str(data), "--cache": str(tmp_path / "cache")}
        arguments = [word for pair in {**defaults, option: value}.items() for word in pair]
        with pytest.raises(SystemExit, match=message) as leaving:
            main(arguments)
        assert "\n" not in str(leaving.value)

    def test_a_checkpoint_of_another_vocabulary_is_refused(self, data, tmp_path):
        save_checkpoint(little_model(words=30), tmp_path / "other.safetensors")
        with pytest.raises(SystemExit, match="knows 30 words but the corpus has 12"):
            main(["--data", str(data), "--checkpoint", str(tmp_path / "other.safetensors")])

    @pytest.mark.parametrize(("text", "count"), [("all", None), ("17", 17)])
    def test_token_counts(self, text, count):
        assert token_count(text) == count

    def test_no_tokens_is_a_usage_error(self, capsys):
        with pytest.raises(SystemExit):
            main(["--tokens", "0"])
        assert "--tokens" in capsys.readouterr().err

    def test_the_module_runs_from_the_root(self):
        command = [sys.executable, "-m", "tutorials.word_language_model", "--data", "nowhere"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.strip() == (
            "error: no folder at nowhere; name one that holds train.txt, valid.txt, test.txt"
        )
