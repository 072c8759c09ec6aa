"""llama.cpp's own server as the endpoint that outputs are bought from."""

import numpy as np
import pytest
import torch

from configs.schema import Api, Model
from models.language import build_model, initialise
from tasks.text import Text
from teacher.endpoint import Endpoint
from teacher.journal import Journal
from teacher.offer import Offer
from teacher.source import LocalModel
from tests.gguf_files import write_gguf
from tests.serving import SHAPE, answers

xllamacpp = pytest.importorskip("xllamacpp", reason='needs pip install -e ".[llama-cpp]"')

ROUNDING = 0.02  # of log-probabilities: it keeps keys and values in 16 bits


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """task, model and url: a model trained for a moment, so that it writes letters."""
    folder = tmp_path_factory.mktemp("llama-cpp")
    words = "the sea rose and the old ships went out to fish or not".split()
    draw = np.random.Generator(np.random.PCG64(0))
    texts = [" ".join(draw.choice(words, 9)) for _ in range(200)]
    (folder / "texts.txt").write_text("\n\n".join(texts), encoding="utf-8")
    task = Text(path=str(folder / "texts.txt"), vocabulary=280, row_tokens=40, prompt_tokens=4)
    model = initialise(build_model(Model(initializer_range=0.1, **SHAPE), task), 0)
    train(model, task)
    write_gguf(model.eval(), task.tokenizer, str(folder / "model.gguf"))
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.port = str(folder / "model.gguf"), 2048, 0
    settings.n_parallel, settings.cpuparams.n_threads = 4, 1
    server = xllamacpp.Server(settings)
    yield task, model, f"{server.listening_address}/v1"
    del server


def train(model, task):
    rows = task.rows("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens = torch.full((len(rows), task.longest_row), -100)
    for i in range(len(rows)):
        row = np.concatenate([rows.prompt(i), rows.completion(i)])
        tokens[i, : len(row)] = torch.from_numpy(row)
    for batch in tokens[: 32 * (len(rows) // 32)].split(32) * 10:
        model(batch.clamp(min=0), labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def rows(served):
    return served[0].rows("train").take(np.arange(40))


@pytest.fixture
def endpoint(served, tmp_path):
    task, _, url = served
    made = []

    def opened(access="text", k=None, api="completions", **settings):
        settings = Api(url=url, model="model", key_env="KEY", endpoint=api, **settings)
        offer = Offer.of(url, "model", "key", settings)
        found = Endpoint(task, offer, settings, access, k, Journal(tmp_path / f"{api}{access}"), 0)
        made.append(found)
        return found

    yield opened
    for one in made:
        one.close()


@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("k", [5, 283])
def test_it_reveals_what_the_weights_do(api, k, served, rows, endpoint):
    task, model, _ = served
    access = ("top_k", k) if k < task.vocabulary else ("logits", None)
    expected = answers(LocalModel(model, task), rows)
    source = endpoint(*access, api)
    source.require_revealed(task.question(rows, 0))
    found = answers(source, rows)
    same = [i for i in found if found[i].tokens.tolist() == expected[i].tokens.tolist()]
    assert len(same) >= 0.9 * len(rows)  # the others are ties
    assert any(found[i].tokens[-1] == task.end for i in same)
    for i in same:
        sure = expected[i].log_probs.topk(5)
        got = found[i].log_probs.gather(-1, sure.indices)
        assert (got - sure.values).abs().max() < ROUNDING * sure.values.abs().max()
    assert source.bill()["completion_tokens"] >= sum(len(expected[i].tokens) - 4 for i in same)


def test_the_text_of_its_answers_ends_where_theirs_do(served, rows, endpoint):
    task, model, _ = served
    expected, found = answers(LocalModel(model, task), rows), answers(endpoint(), rows)
    texts = [{i: task.render(row.tokens) for i, row in each.items()} for each in (expected, found)]
    ends = [
        {i for i, row in each.items() if row.tokens[-1] == task.end} for each in (expected, found)
    ]
    assert sum(texts[0][i] == texts[1].get(i) for i in texts[0]) >= 0.9 * len(rows)
    assert len(ends[0] ^ ends[1]) <= 0.1 * len(rows)


def test_it_draws_from_all_tokens_only_if_it_is_told_to(served, endpoint):
    """By default it drops all but the likeliest 40, and what is less than a twentieth as likely as
    the first."""
    task, model, _ = served
    rows = task.rows("train").take(np.arange(150))
    drawn, expected = {}, {}
    for name, body in (("whole", {"top_k": 0, "min_p": 0}), ("default", {})):
        source = endpoint(body=body)
        source.journal.database.execute("DELETE FROM answers")
        drawn[name] = expected[name] = 0
        for row in answers(source, rows, 1.0).values():
            tokens = torch.from_numpy(row.tokens)[None]
            with torch.no_grad():
                probs = model(tokens).logits[0, row.prompt_length - 1 : -1].softmax(-1)
            rare = probs < probs.amax(-1, keepdim=True) / 20
            drawn[name] += int(rare.gather(-1, tokens[0, row.prompt_length :, None]).sum())
            expected[name] += float(probs[rare].sum())
    assert drawn["default"] < 0.1 * expected["default"]
    assert expected["whole"] > 20
    assert abs(drawn["whole"] - expected["whole"]) < 4 * expected["whole"] ** 0.5
