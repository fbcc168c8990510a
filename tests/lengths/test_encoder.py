"""Fine-tuning of a small BERT with random weights: every task end to end, the two phases, the head's shape."""

import pytest

from ds_llmpq.lengths import dataset
from ds_llmpq.lengths.config import LengthDataConfig, LengthTaskConfig, ProxyConfig
from ds_llmpq.lengths.predictor import load_predictor, train
from ds_llmpq.lengths.records import Example
from ds_llmpq.lengths.tasks import KINDS
from scripts.make_length_data import make_answers

torch = pytest.importorskip("torch")
CONFIG = LengthDataConfig(max_tokens=32, truncation="head_tail")


@pytest.fixture(scope="module")
def data():
    rows = make_answers(80, 0)
    return dataset.split([Example(a.text, a.output_tokens, a.model, 9, str(n)) for n, a in enumerate(rows)], CONFIG)


@pytest.fixture(scope="module")
def bert(tmp_path_factory, data):
    """A one-layer BERT of random weights and a tokenizer of the data's words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word for example in data.train for word in example.text.lower().replace(".", " ").split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words) + 5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def proxy(bert, **changes):
    return ProxyConfig(**{"kind": "encoder", "path": str(bert), "epochs": 2, "learning_rate": 1e-3, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_trains_saves_loads_and_predicts(data, bert, tmp_path, kind):
    predictor = train(data, LengthTaskConfig(kind=kind), proxy(bert), CONFIG)
    predictor.save(tmp_path)
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".pkl", ".bin", ".pt")]
    one, other = predictor.predict(data.test), load_predictor(tmp_path).predict(data.test)
    assert one.tokens == pytest.approx(other.tokens, rel=1e-4)
    assert one.bounds["q95"] == pytest.approx(other.bounds["q95"], rel=1e-4)
    assert (one.tokens >= 1).all()


def test_quantile_loss_gives_a_column_a_quantile(data, bert):
    predictor = train(data, LengthTaskConfig(loss="quantile"), proxy(bert), CONFIG)
    assert predictor.model.scores(data.test[:3]).shape == (3, 3)
    assert predictor.model.head.second.in_features == 128 + 3  # one-hot of three models


def test_the_second_phase_trains_the_head_alone(data, bert):
    before = train(data, LengthTaskConfig(), proxy(bert, epochs=1), CONFIG).model
    after = train(data, LengthTaskConfig(), proxy(bert, epochs=2), CONFIG).model

    def same(one, other):
        return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))

    assert same(before.encoder, after.encoder)
    assert not same(before.head, after.head)


def test_training_lowers_the_loss(data, bert):
    from ds_llmpq.lengths.dataset import collect_lengths
    from ds_llmpq.lengths.encoder import _loss

    def loss(epochs):
        predictor = train(data, LengthTaskConfig(loss="mse"), proxy(bert, epochs=epochs, learning_rate=5e-3), CONFIG)
        target = torch.tensor(predictor.task.targets(collect_lengths(data.train)))
        return float(_loss(predictor.task, torch.tensor(predictor.model.scores(data.train)), target))

    assert loss(40) < 0.7 * loss(1)


def test_long_prompts_are_cut_to_what_the_encoder_takes(data, bert):
    model = train(data, LengthTaskConfig(), proxy(bert, epochs=1), CONFIG).model
    ids = model._encode("list " * 500 + "rain")
    assert len(ids) == 32
    assert (ids[0], ids[-1]) == (model.tokenizer.cls_token_id, model.tokenizer.sep_token_id)


def test_a_killed_training_goes_on_to_the_same_weights(data, bert, tmp_path, monkeypatch):
    from ds_llmpq.lengths.training_state import FILE_NAME, TrainingState

    whole = train(data, LengthTaskConfig(), proxy(bert, epochs=4), CONFIG).model
    keep, kept = TrainingState.keep, []

    def killed_after_the_third(state, epochs, *everything):
        keep(state, epochs, *everything)
        kept.append(epochs)
        if len(kept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "keep", killed_after_the_third)
    with pytest.raises(KeyboardInterrupt):
        train(data, LengthTaskConfig(), proxy(bert, epochs=4), CONFIG, tmp_path)
    assert (tmp_path / FILE_NAME).is_file()
    again = train(data, LengthTaskConfig(), proxy(bert, epochs=4), CONFIG, tmp_path).model
    assert kept == [1, 2, 3, 4]
    for name in ("encoder", "head"):
        pairs = zip(getattr(whole, name).parameters(), getattr(again, name).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert not (tmp_path / FILE_NAME).exists()
    (tmp_path / FILE_NAME).write_bytes(b"of something else")
    train(data, LengthTaskConfig(), proxy(bert, epochs=1), CONFIG, tmp_path)
