"""The classifier: what it reads, what it saves, and what it rejects."""

from types import SimpleNamespace

import pytest
import torch

from configs.schema import LabError, Model
from models.language import build_model, initialise, load_model, logits_at, save_model
from models.rows import collate
from tasks.digits import Digits
from tasks.pronounce import Pronounce

TASK = SimpleNamespace(name="digits", tokenizer=None, vocabulary=10, longest_row=785)


def classifier(seed: int = 0, **settings) -> torch.nn.Module:
    shape = {"hidden_size": 12, "num_hidden_layers": 2, "initializer_range": 0.1}
    return initialise(build_model(Model(architecture="mlp", **shape | settings), TASK), seed)


@pytest.fixture
def ids(generator) -> torch.Tensor:
    pixels = torch.randint(0, 256, (6, 784), generator=generator)
    labels = torch.randint(0, 10, (6, 1), generator=generator)
    return torch.cat([pixels, labels], dim=1)


def test_the_label_in_a_row_changes_nothing(ids):
    model = classifier().eval()
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 10
    assert torch.equal(model(ids).logits, model(other).logits)
    assert torch.equal(model(ids).logits, model(ids[:, :-1]).logits)


def test_rows_of_a_batch_do_not_affect_each_other(ids):
    model = classifier().eval()
    one_by_one = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(one_by_one, model(ids).logits)


def test_options_of_language_models_change_nothing(ids):
    model = classifier().eval()
    assert torch.equal(model(ids, use_cache=False).logits, model(ids).logits)


def test_there_is_one_row_of_logits_per_label_of_a_batch():
    task = Digits(limit=200)
    rows = task.rows("train")
    batch = collate(rows, torch.arange(5).numpy(), pad=task.pad)
    logits = logits_at(classifier()(batch.input_ids), batch, task.vocabulary)
    assert logits.shape == (5, 10)
    assert batch.targets.tolist() == [int(rows.completion(i)[0]) for i in range(5)]


def test_a_saved_classifier_gives_the_same_logits(ids, tmp_path):
    model = classifier(settings={"dropout": 0.5}).eval()
    save_model(model, None, tmp_path / "model", "a card")
    loaded = load_model(tmp_path / "model")
    assert not loaded.training
    assert loaded.config.dropout == 0.5
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_dropout_is_off_in_evaluation(ids):
    model = classifier(settings={"dropout": 0.5})
    torch.manual_seed(0)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_float64_is_kept_through_training_and_saving(ids, tmp_path):
    model = classifier().double().eval()
    logits = model(ids).logits
    assert logits.dtype == torch.float64
    logits.sum().backward()
    assert model.head.weight.grad.dtype == torch.float64
    torch.testing.assert_close(classifier().eval()(ids).logits.double(), logits, rtol=0, atol=1e-4)
    save_model(model, None, tmp_path / "model", "a card")
    assert torch.equal(load_model(tmp_path / "model")(ids).logits, logits)


def test_the_starting_weights_are_those_of_the_seed(ids):
    assert torch.equal(classifier(1).head.weight, classifier(1).head.weight)
    assert not torch.equal(classifier(1).head.weight, classifier(2).head.weight)
    assert not classifier(1).head.bias.any()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_attention_heads": 2}, "num_attention_heads"),
        ({"intermediate_size": 8}, "intermediate_size"),
        ({"settings": {"drop_out": 0.1}}, "did you mean 'dropout'"),
    ],
)
def test_a_setting_that_it_does_not_have_is_rejected_in_one_line(settings, reason):
    with pytest.raises(LabError, match=reason) as error:
        classifier(**settings)
    assert "\n" not in str(error.value)


def test_a_language_model_cannot_read_images():
    with pytest.raises(LabError, match="reads text"):
        build_model(Model(hidden_size=8, num_hidden_layers=1, num_attention_heads=1), TASK)


def test_a_classifier_cannot_read_text():
    with pytest.raises(LabError, match="'mlp' classifies images, but task pronounce is text"):
        build_model(Model(architecture="mlp"), Pronounce(limit=100))
