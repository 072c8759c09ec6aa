"""The teacher's outputs on disk: what is stored is what the teacher computed, for the right row."""

import copy
import hashlib
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import LabError, Recipe
from experiment.cost import CountedForward
from models.generate import generate
from models.language import load_model
from models.rows import collate
from models.states import states_options, value_relation
from student.recipe import uses_relations
from tasks.pronounce import Pronounce
from teacher import outputs as outputs_module
from teacher.outputs import (
    OutputsRequest,
    finish_outputs,
    make_outputs,
    sha256_of_outputs,
)
from teacher.shards import Outputs, read_provenance, write_provenance
from teacher.source import LocalModel
from tests.helpers import edited


def request(**settings):
    recipe = Recipe(**settings)
    return OutputsRequest.of(recipe, uses_relations(recipe))


DATA = request(access="logits", sequences="data")
WRITTEN = request(access="logits", sequences="teacher")
FEW = request(access="logits", sequences="data", outputs={"transfer_rows": 12})
TOP = request(access="top_k", sequences="data", outputs={"k": 5})
SAMPLED = request(access="sampled", sequences="data", outputs={"k": 12})
TEXT = request(access="text", sequences="teacher", objective="cross_entropy")
INVENTED = request(
    access="logits", sequences="teacher", outputs={"prompts": "invented", "transfer_rows": 40}
)
HIDDEN_DATA, HIDDEN_WRITTEN, HIDDEN_INVENTED = (
    replace(one, access="hidden", layers=(1, 1)) for one in (DATA, WRITTEN, INVENTED)
)
RELATED_DATA, RELATED_WRITTEN, RELATED_INVENTED = (
    replace(one, relations=True) for one in (HIDDEN_DATA, HIDDEN_WRITTEN, HIDDEN_INVENTED)
)


def name_of(one):
    return one.name


def row_count(request, rows):
    return request.transfer_rows or len(rows)


def source_of(forward, task, request):
    return LocalModel(forward, task, request.layers, request.relations)


@pytest.fixture(scope="module")
def task():
    return Pronounce(limit=400)


@pytest.fixture(scope="module")
def teacher(tiny_run):
    return load_model(tiny_run / "teacher")


@pytest.fixture(scope="module")
def rows(task):
    return task.rows("train").take(np.arange(100))


@pytest.fixture
def make(tmp_path, task, teacher, rows, monkeypatch):
    monkeypatch.setattr(outputs_module, "SHARD_ROWS", 30)

    def make(recipe, forward=teacher, **changed):
        folder = tmp_path / name_of(recipe)
        binding = recipe.binding("teacher-sha", "tokenizer-sha", rows, 0) | changed
        make_outputs(folder, source_of(forward, task, recipe), rows, recipe, binding)
        finish_outputs(folder, row_count(recipe, rows))
        return Outputs(folder, binding)

    return make


def live_log_probs(teacher, batch):
    with torch.no_grad():
        return torch.log_softmax(teacher(batch.input_ids).logits[batch.counted], -1)


def size_of(folder):
    return sum(file.stat().st_size for file in folder.glob("*.arrow"))


@pytest.mark.parametrize("recipe", [DATA, WRITTEN, INVENTED], ids=name_of)
def test_stored_outputs_equal_live_ones_whatever_the_order_of_the_rows(
    recipe, make, teacher, generator
):
    stored = make(recipe)
    order = torch.randperm(len(stored.rows), generator=generator).numpy()
    for indices in np.array_split(order, 7):
        batch = collate(stored.rows, indices, pad=0)
        signal = stored.signal(batch)
        assert torch.equal(signal.targets, batch.targets)
        torch.testing.assert_close(
            signal.log_probs.float(), live_log_probs(teacher, batch), atol=2e-2, rtol=1e-3
        )


@pytest.mark.parametrize(
    "recipe",
    [HIDDEN_DATA, HIDDEN_WRITTEN, HIDDEN_INVENTED, RELATED_DATA, RELATED_WRITTEN, RELATED_INVENTED],
    ids=name_of,
)
@pytest.mark.parametrize("shuffled", [False, True])
def test_stored_states_equal_live_ones_at_every_position_that_a_token_follows(
    recipe, shuffled, make, teacher, generator
):
    original = make(recipe)
    stored = make(recipe).shuffled(seed=0) if shuffled else original
    order = torch.randperm(len(stored.rows), generator=generator).numpy()
    for indices in np.array_split(order, 5):
        batch = collate(stored.rows, indices, pad=0)
        sources = stored.source[indices]
        batch_there = collate(original.rows, sources, pad=0)
        with torch.no_grad():
            output = teacher(batch_there.input_ids, **states_options([1], relations=True))
        states = output.hidden_states[1][batch_there.positions]
        attended = output.attentions[0].mean(1)[batch_there.positions]
        values = output.past_key_values.layers[0].values
        related = value_relation(values, values.shape[2])[batch_there.positions]
        maps = [attended, attended, related, related] if recipe.relations else [attended, attended]
        found = stored.hidden(batch).states
        assert found.shape == (int(batch.positions.sum()), 2, stored.width)
        for layer in range(2):
            live = original.standardise(states[:, None].expand(-1, 2, -1))[:, layer]
            torch.testing.assert_close(found[:, layer], live, atol=2e-2, rtol=2e-3)
        revealed = stored.hidden(batch)
        attention = revealed.attention
        if recipe.relations:
            attention = torch.cat([attention, revealed.relations], dim=1)
        assert attention.shape[1] == len(maps)
        for place, there in enumerate(maps):
            here = attention[:, place]
            width = min(here.shape[-1], there.shape[-1])  # cut-off columns are later positions
            torch.testing.assert_close(here[:, :width], there[:, :width], atol=1e-3, rtol=1e-3)
            assert not here[:, width:].any()
        everything = original.hidden(
            collate(original.rows, np.arange(len(original.rows)), pad=0)
        ).states
        torch.testing.assert_close(everything.mean(0), torch.zeros(2, 32), atol=1e-3, rtol=0)
        torch.testing.assert_close(everything.std(0), torch.ones(2, 32), atol=1e-3, rtol=0)


def test_a_stored_and_a_live_signal_give_the_same_loss(make, teacher, generator):
    from student.objectives import forward_kl
    from teacher.signal import Signal

    stored = make(DATA)
    batch = collate(stored.rows, np.arange(50), pad=0)
    live = Signal(batch.targets, live_log_probs(teacher, batch))
    student = torch.randn(*live.log_probs.shape, generator=generator)
    torch.testing.assert_close(
        forward_kl(student, stored.signal(batch)).mean(),
        forward_kl(student, live).mean(),
        rtol=1e-3,
        atol=0,
    )


@pytest.mark.parametrize("recipe", [WRITTEN, HIDDEN_WRITTEN])
def test_a_shard_of_full_distributions_takes_at_most_a_gigabyte(recipe):
    """It is in memory until it is written: 1,024 rows of a large vocabulary would take 50 GB."""
    assert 1 <= recipe.rows_of_shard(512, 49_152) * 512 * 49_152 * 2 <= 2**30
    assert recipe.rows_of_shard(512, 300_000) == 3
    assert recipe.rows_of_shard(40_000, 300_000) == 1
    assert recipe.rows_of_shard(24, 72) == TEXT.rows_of_shard(24, 300_000) == 8192


def test_top_k_keeps_the_k_largest_and_their_tokens(make, teacher):
    stored = make(TOP)
    batch = collate(stored.rows, np.arange(50), pad=0)
    signal, live = stored.signal(batch), live_log_probs(teacher, batch)
    assert signal.log_probs.shape == signal.indices.shape == (len(batch.targets), 5)
    torch.testing.assert_close(
        live.gather(-1, signal.indices), signal.log_probs.float(), atol=1e-2, rtol=1e-3
    )
    torch.testing.assert_close(live.topk(5).values, signal.log_probs.float(), atol=1e-2, rtol=1e-3)


def test_sampled_outputs_are_draws_from_the_teachers_own_distribution(make, teacher, tmp_path):
    stored = make(SAMPLED)
    batch = collate(stored.rows, np.arange(100), pad=0)
    signal, live = stored.signal(batch), live_log_probs(teacher, batch)
    assert torch.allclose(signal.weights.sum(-1), torch.ones(len(live)))
    drawn = signal.weights > 0
    torch.testing.assert_close(
        live.gather(-1, signal.indices)[drawn],
        signal.log_probs.float()[drawn],
        atol=2e-2,
        rtol=1e-3,
    )
    # over all positions the shares of the draws are the probabilities, tail and all
    shares = torch.zeros_like(live).scatter_add(-1, signal.indices, signal.weights)
    torch.testing.assert_close(shares.mean(0), live.exp().mean(0), atol=0.02, rtol=0)
    # and they take fewer bytes than all probabilities
    make(DATA)
    assert size_of(tmp_path / name_of(SAMPLED)) < 0.5 * size_of(tmp_path / "data-logits")


def test_the_loss_of_sampled_outputs_is_that_of_all_probabilities_in_the_mean(
    make, teacher, generator
):
    from student.objectives import forward_kl
    from teacher.signal import Signal

    stored = make(SAMPLED)
    batch = collate(stored.rows, np.arange(100), pad=0)
    live = Signal(batch.targets, live_log_probs(teacher, batch))
    student = torch.randn(*live.log_probs.shape, generator=generator)
    found, exact = (forward_kl(student, s).mean().item() for s in (stored.signal(batch), live))
    assert found == pytest.approx(exact, rel=0.03)
    # and a row has the same draws in every batch
    turned = stored.signal(collate(stored.rows, np.arange(100)[::-1].copy(), pad=0))
    there, back = (forward_kl(student * 0, s).sum().item() for s in (stored.signal(batch), turned))
    assert there == pytest.approx(back, rel=1e-4)


def test_text_reveals_the_greedy_answers_and_nothing_more(make, teacher, task, rows):
    stored = make(TEXT)
    assert stored.signal(collate(stored.rows, np.arange(10), pad=0)).log_probs is None
    for i in range(20):
        prompt = torch.from_numpy(rows.prompt(i).astype(np.int64))[None]
        ids = prompt
        while ids.shape[1] - prompt.shape[1] < task.longest_answer:  # without a cache, one by one
            with torch.no_grad():
                ids = torch.cat([ids, teacher(ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == task.tokenizer.eos_token_id:
                break
        assert stored.rows.row(i).tolist() == ids[0].tolist()
        assert stored.rows.ids[i] == rows.ids[i]


def test_the_tokens_that_a_teacher_writes_are_counted(make, rows, tmp_path):
    stored = make(TEXT)
    summary = finish_outputs(tmp_path / name_of(TEXT), row_count(TEXT, rows))
    written = stored.rows.lengths - stored.rows.prompt_lengths
    assert summary.tokens == written.sum() > 0


def test_shuffled_outputs_give_every_row_those_of_another(make, rows):
    original, stored = make(DATA), make(DATA).shuffled(seed=0)
    places = {int(row): i for i, row in enumerate(rows.ids)}
    assert len(stored.rows) > 0.9 * len(rows)
    for i in range(len(stored.rows)):
        own, other = places[int(stored.rows.ids[i])], stored.source[i]
        assert other != own
        assert stored.rows.prompt(i).tolist() == rows.prompt(own).tolist()
        assert stored.rows.completion(i).tolist() == rows.completion(other).tolist()
        assert rows.prompt_lengths[own] == rows.prompt_lengths[other]
    moved = stored.signal(collate(stored.rows, np.array([4]), pad=0))
    kept = original.signal(collate(original.rows, stored.source[[4]], pad=0))
    assert torch.equal(moved.log_probs, kept.log_probs)


def test_invented_words_are_well_formed_and_never_from_an_unseen_split(make, task):
    from tasks.pronounce import split_of

    stored = make(INVENTED)
    assert len(stored.rows) == 40
    for i in range(40):
        word = task.question(stored.rows, i)
        assert split_of(word) != "long"
        assert word not in task.words or split_of(word) == "train"


@pytest.mark.parametrize("prompts", ["invented", "extended"])
def test_only_prompts_that_extend_the_data_may_not_repeat_it(prompts, make, rows, monkeypatch):
    taken = []
    write = outputs_module.shard_records

    def shard_records(*arguments):
        taken.append(len(arguments[4]))
        return write(*arguments)

    monkeypatch.setattr(outputs_module, "shard_records", shard_records)
    make(replace(WRITTEN, prompts=prompts, transfer_rows=len(rows) + 8))
    assert taken[0] == {"invented": 0, "extended": len(rows)}[prompts]


def test_extended_prompts_are_those_of_the_data_and_then_invented_ones(
    make, teacher, task, rows, tmp_path
):
    """The first prompts are those of the data, even in mid-shard; no word is repeated."""
    count = len(rows) + 60
    recipe = replace(WRITTEN, prompts="extended", transfer_rows=count)
    stored = make(recipe)
    asked = [task.question(stored.rows, i) for i in range(count)]
    assert asked[: len(rows)] == [task.question(rows, i) for i in range(len(rows))]
    assert not {*asked[: len(rows)]} & {*asked[len(rows) :]}
    different = finish_outputs(tmp_path / name_of(recipe), row_count(recipe, rows)).different
    assert different == len({*asked})
    few = make(replace(recipe, transfer_rows=12))
    assert np.array_equal(few.rows.ids[np.arange(12)], make(FEW).rows.ids[np.arange(12)])


@pytest.mark.parametrize("recipe", [SAMPLED, INVENTED], ids=["data", "invented"])
def test_several_processes_share_the_shards_and_write_the_same_bytes(
    recipe, make, teacher, task, rows, tmp_path
):
    make(recipe)
    single, shared = tmp_path / name_of(recipe), tmp_path / "shared"
    binding = recipe.binding("teacher-sha", "tokenizer-sha", rows, 0)
    written = []
    for process in (2, 0, 1):
        source = source_of(teacher, task, recipe)
        make_outputs(shared, source, rows, recipe, binding, process=process, processes=3)
        written.append(len(list(shared.glob("*.arrow"))))
    finish_outputs(shared, row_count(recipe, rows))
    files = sorted(file.name for file in single.iterdir())
    assert files == sorted(file.name for file in shared.iterdir())
    assert written[-1] == len(files) - 1 > written[0] >= 0
    for name in files:
        assert (single / name).read_bytes() == (shared / name).read_bytes(), name


def test_interrupted_outputs_resume_at_the_missing_shard_at_the_same_cost(
    make, teacher, task, rows, tmp_path
):
    """Otherwise a student whose outputs were interrupted would get steps for free."""
    whole = make(WRITTEN, forward=CountedForward(teacher))
    folder = tmp_path / name_of(WRITTEN)
    before = {file.name: file.read_bytes() for file in folder.glob("*.arrow")}
    assert len(before) == 4
    for lost in ([], [sorted(before)[2]], list(before)):
        for name in lost:
            (folder / name).unlink()
        counted = CountedForward(teacher)
        binding = WRITTEN.binding("teacher-sha", "tokenizer-sha", rows, 0)
        make_outputs(folder, source_of(counted, task, WRITTEN), rows, WRITTEN, binding)
        flops = finish_outputs(folder, row_count(WRITTEN, rows)).flops
        assert {file.name: file.read_bytes() for file in folder.glob("*.arrow")} == before
        assert (counted.flops > 0) == bool(lost)
        assert counted.flops == pytest.approx(flops) or len(lost) < 4
        assert Outputs(folder, binding).rows.digest() == whole.rows.digest()
    assert flops > 0


def test_outputs_of_another_teacher_are_rejected_by_name(make, tmp_path):
    make(DATA)
    with pytest.raises(LabError, match=r"another teacher .*move that folder"):
        make(DATA, teacher="another")


@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_a_damaged_shard_is_rejected(damage, make, tmp_path):
    make(DATA)
    folder = tmp_path / name_of(DATA)
    file = next(folder.glob("shard-00001.*"))
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content[:-100] if damage == "cut" else content)
    with pytest.raises(LabError, match=r"shard-00001\.\w+\.arrow is (damaged|missing)"):
        Outputs(folder)


def test_generation_with_a_cache_counts_its_flops_exactly(task, teacher):
    from torch.utils.flop_counter import FlopCounterMode

    prompts = [np.asarray(task.prompt(word)) for word in ("distill", "lab", "teacher")]
    counted = CountedForward(teacher)
    options = {"longest": 8, "end": task.tokenizer.eos_token_id}
    with FlopCounterMode(display=False) as counter:
        generate(teacher, prompts, **options)
    for _ in range(2):  # the first call measures the shapes, the second looks them up
        counted(torch.ones((1, 5), dtype=torch.long), use_cache=False)  # has more logits
        counted.flops = 0
        generate(counted, prompts, **options)
        assert counted.flops == counter.get_total_flops()


def test_a_batch_of_prompts_gives_the_answers_of_each_prompt_by_itself(task, teacher):
    words = ("a", "lab", "teacher", "student", "distillation", "at")
    prompts = [np.asarray(task.prompt(word)) for word in words]
    options = {
        "longest": 9,
        "end": task.tokenizer.eos_token_id,
        "keep_log_probs": True,
        "keep_layers": [1],
    }
    for prompt, answer in zip(prompts, generate(teacher, prompts, **options), strict=True):
        (alone,) = generate(teacher, [prompt], **options)
        assert answer.tokens.tolist() == alone.tokens.tolist()
        own = answer.log_probs.gather(-1, answer.tokens[:, None]).sum()
        assert answer.log_prob == pytest.approx(float(own), rel=1e-5)
        for name in ("log_probs", "hidden", "maps"):
            torch.testing.assert_close(getattr(answer, name), getattr(alone, name))
    assert len({len(a.tokens) for a in generate(teacher, prompts, **options)}) > 1


def test_sampling_follows_the_models_own_distribution(task, teacher):
    """No hidden top-p or temperature: frequencies of 20,000 first tokens match the softmax."""
    prompts = torch.tensor([task.prompt("lab")]).repeat(20_000, 1)
    written = generate(
        teacher,
        prompts,
        longest=1,
        end=-1,
        temperature=1.0,
        generator=torch.Generator().manual_seed(0),
        keep_log_probs=True,
    )
    found = torch.bincount(torch.cat([w.tokens for w in written]), minlength=72) / 20_000
    torch.testing.assert_close(found, written[0].log_probs[0].exp(), atol=0.015, rtol=0)


@pytest.mark.parametrize("count", [1_500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_corrupted_byte_ever_gives_a_wrong_row(count, make, tmp_path):
    """Every corrupted folder is either rejected in one line or reads as it was written."""
    whole = make(FEW)
    folder = tmp_path / name_of(FEW)
    binding = json.loads((folder / "provenance.json").read_text("utf-8"))["binding"]
    digest = whole.rows.digest()
    values = [array.copy() for array, _ in whole.columns["log_probs"]]
    files = sorted(folder.iterdir())
    contents = {file: file.read_bytes() for file in files}
    draw = random.Random(0)
    refused = []
    for _ in range(count):
        file = draw.choice(files)
        broken = bytearray(contents[file])
        for _ in range(draw.randint(1, 3)):
            kind, place = draw.randrange(3), draw.randrange(len(broken))
            if kind == 0:
                broken[place] ^= 1 << draw.randrange(8)
            elif kind == 1:
                del broken[place : place + draw.randint(1, 50)]
            else:
                broken[place:place] = draw.randbytes(draw.randint(1, 50))
            if not broken:
                break
        file.write_bytes(broken)
        try:
            found = Outputs(folder, binding)
        except LabError as error:
            refused.append(str(error))
        else:
            assert found.rows.digest() == digest
            for (array, _), expected in zip(found.columns["log_probs"], values, strict=True):
                assert np.array_equal(array, expected)
        file.write_bytes(contents[file])
    assert len(refused) > 0.9 * count
    assert max(len(line.splitlines()) for line in refused) == 1


def test_a_file_that_is_no_shard_is_rejected_whatever_its_hash(make, tmp_path):
    """Even if provenance.json has its hash."""
    make(FEW)
    folder = tmp_path / name_of(FEW)
    shard = next(folder.glob("shard-*"))
    whole, draw, refused = shard.read_bytes(), random.Random(0), []
    forged = [b"", b"no arrow at all", whole[:100], whole[: len(whole) // 2]]
    for _ in range(100):  # in the head of the file, where the schema and the lengths are
        broken = bytearray(whole)
        broken[draw.randrange(min(3000, len(whole)))] ^= 1 << draw.randrange(8)
        forged.append(bytes(broken))
    for content in forged:
        shard.write_bytes(content)
        with edited(folder / "provenance.json") as provenance:
            provenance["shards"][shard.name] = hashlib.sha256(content).hexdigest()
        try:
            Outputs(folder)
        except LabError as error:
            refused.append(str(error))
    assert len(refused) >= 20
    assert max(len(line.splitlines()) for line in refused) == 1


MEASURE = """
import sys
from pathlib import Path
from configs.schema import Model, Recipe
from tasks.pronounce import Pronounce
from models.rows import batch_order, collate
from models.language import build_model, initialise
from teacher.outputs import OutputsRequest, finish_outputs, make_outputs
from teacher.shards import Outputs
from teacher.source import LocalModel
from tests.helpers import edited

folder, count = Path(sys.argv[1]), int(sys.argv[2])
task = Pronounce()
rows = task.rows("train")
shape = Model(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
teacher = initialise(build_model(shape, task), 0).eval()
request = OutputsRequest.of(Recipe(access="top_k", outputs={"k": 5, "transfer_rows": count}))
binding = request.binding("teacher", "tokenizer", rows, 0)
make_outputs(folder, LocalModel(teacher, task), rows, request, binding)
finish_outputs(folder, count)


def status(name):
    lines = open("/proc/self/status", encoding="utf-8").read().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(name))


print(status("VmHWM"))  # the peak of writing, when nothing is mapped
stored = Outputs(folder, binding)
order = batch_order(stored.rows.lengths, 64, 0)
for step in range(200):
    stored.signal(collate(stored.rows, order(step), 0))
print(status("RssAnon"))  # without pages of files, which the system takes back as it needs them
"""


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux reports memory without mapped files"
)
def test_a_million_rows_take_no_more_memory_than_ten_thousand(tmp_path):
    """Written shard by shard, read memory-mapped: within 10 %."""
    few, many = (
        subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path / str(count)), str(count)],
            cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
        ).stdout.split()
        for count in (10_000, 1_000_000)
    )  # fmt: skip
    for a_few, a_million in zip(few, many, strict=True):  # in writing, in reading
        assert int(a_million) <= 1.10 * int(a_few)


def test_outputs_are_read_only_when_all_shards_are_there(make, tmp_path, rows):
    make(DATA)
    folder = tmp_path / name_of(DATA)
    binding = read_provenance(folder)["binding"]
    last = max(folder.glob("shard-*"))
    last.rename(tmp_path / "elsewhere")
    write_provenance(folder, binding, None)
    with pytest.raises(LabError, match="shard 3 is missing; "):
        finish_outputs(folder, len(rows))
    with pytest.raises(LabError, match="is not finished; run train"):
        Outputs(folder, binding)


def test_outputs_of_more_rows_than_asked_for_are_refused(make, tmp_path, rows):
    make(DATA)
    with pytest.raises(LabError, match="holds more than the 70 rows of these outputs"):
        finish_outputs(tmp_path / name_of(DATA), 70)


def test_a_teacher_that_invents_nothing_well_formed_is_rejected(task, teacher):
    mute = copy.deepcopy(teacher)
    mute.lm_head = torch.nn.Linear(mute.config.hidden_size, task.vocabulary)
    torch.nn.init.zeros_(mute.lm_head.weight)
    with torch.no_grad():
        mute.lm_head.bias.copy_(100.0 * (torch.arange(task.vocabulary) == task.end))
    invented = LocalModel(mute, task).invent(5, 1.0, False, torch.Generator(), set())
    with pytest.raises(LabError, match=r"rarely invents well-formed words \(0 of 512 tries\)"):
        list(invented)


def test_every_row_counts_once_towards_the_progress(task, teacher, rows, tmp_path):
    for recipe in (DATA, TEXT, replace(WRITTEN, prompts="extended", transfer_rows=len(rows) + 20)):
        seen = []
        binding = recipe.binding("teacher-sha", "tokenizer-sha", rows, 0)
        source = source_of(teacher, task, recipe)
        make_outputs(tmp_path / recipe.name, source, rows, recipe, binding, seen.append)
        assert sum(seen) == row_count(recipe, rows)


def test_states_are_standardised_dimension_by_dimension(make):
    stored = make(HIDDEN_DATA)
    (values,) = [values for values, _ in stored.columns["hidden"]][:1]
    states = torch.from_numpy(values.reshape(-1, stored.layers, stored.width).copy()).float()
    found = stored.standardise(states)
    assert found.shape[1:] == (2, 32)
    assert float(found.mean(0).abs().max()) < 0.3  # of the first shard; measured over all of them
    assert 0.7 < float(found.std(0).min()) < float(found.std(0).max()) < 1.3


def test_the_hash_of_outputs_is_that_of_their_shards_in_order(tmp_path):
    found = set()
    for shards in ({"a": "0f", "b": "1e"}, {"a": "1e", "b": "0f"}, {"a": "0f"}, {}, None):
        write_provenance(tmp_path, {}, shards)
        found.add(sha256_of_outputs(tmp_path))
        text = "".join((shards or {}).values())
        assert sha256_of_outputs(tmp_path) == hashlib.sha256(text.encode()).hexdigest()
    assert len(found) == 4
