"""Every key of a config changes what it is about, and nothing else: weights of all models and
outputs are compared with those of the same config without the change."""

import json

import pytest

import train
from configs.schema import Config
from tests.helpers import tensor_hashes

TEACHER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
STUDENT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
FEW = {"transfer_rows": 64}
RECIPES = {
    "plain": {"access": "logits", "temperature": 2, "outputs": FEW},
    "jsd": {"access": "logits", "objective": "generalised_jsd", "outputs": FEW},
    "skewed": {"access": "logits", "objective": "skewed_forward_kl", "outputs": FEW},
    "annealed": {
        "access": "logits",
        "objective": {"forward_kl": 0.5, "cross_entropy": 0.5},
        "temperature": {"start": 3, "end": 1, "until": 0.8},
        "outputs": FEW,
    },
    "top": {"access": "top_k", "outputs": {**FEW, "k": 5}},
    "drawn": {"access": "sampled", "outputs": {**FEW, "k": 5}},
    "written": {
        "access": "text",
        "sequences": "teacher",
        "objective": "cross_entropy",
        "outputs": {**FEW, "temperature": 1.0},
    },
    "states": {
        "access": "hidden",
        "objective": {"forward_kl": 0.5, "hidden_mse": {"start": 0.5, "end": 0, "until": 0.5}},
        "outputs": {**FEW, "layers": [1]},
    },
    "own": {"access": "logits", "sequences": "student", "objective": "reverse_kl", "outputs": FEW},
    "mixed": {"access": "logits", "student": {"on_policy": 0.5}, "outputs": FEW},
    "few": {"access": "none", "objective": "cross_entropy", "control": {"label_fraction": 0.5}},
    "averaged": {"access": "logits", "teachers": ["teacher", "second_teacher"], "outputs": FEW},
}
TRAINING = {"batch_rows": 32, "learning_rate": 0.01, "prompt_weight": 0.0}
CONFIG = {
    "name": "base",
    "task": {"name": "pronounce", "limit": 150},
    "seeds": [0],
    "threads": 1,
    "teacher": {
        "model": {**TEACHER, "initializer_range": 0.2},
        "training": {**TRAINING, "prompt_weight": 1.0},
        "epochs": 2,
    },
    "students": {
        "model": {**STUDENT, "initializer_range": 0.2},
        "training": TRAINING,
        "budget": 0.6,
    },
    "recipes": RECIPES,
    "controls": ["baseline", "low_data", "shuffled", "smoothed", "second_teacher"],
    "log_every": 5,
}
TWO = {"teacher", "plain", "baseline"}  # what most changes are tried on
PLAIN = {"teacher", "plain", "jsd", "shuffled", "smoothed"}
ALL = {"teacher", "second_teacher", *RECIPES, *CONFIG["controls"]}
T, S, R = "teacher.training.", "students.training.", "recipes."
OPTIMISER = (
    "learning_rate=0.005", "warmup_fraction=0.5", "final_fraction=0.5", "weight_decay=0.5",
    "betas=[0.5, 0.9]", "clip_norm=0.1",
)  # fmt: skip
SIZES = ("hidden_size=32", "num_hidden_layers=3", "intermediate_size=96")
# (overrides, models that are trained, those of them that change)
CASES = [
    (["task.limit=120"], TWO, TWO),
    (["precision=float64"], TWO, TWO),
    (["teacher.seed=5"], TWO, {"teacher", "plain"}),
    (["teacher.model.initializer_range=0.1"], TWO, {"teacher", "plain"}),
    (["teacher.model.settings={attention_bias: true}"], TWO, {"teacher", "plain"}),
    *(([T + key], TWO, {"teacher", "plain"}) for key in (*OPTIMISER, "prompt_weight=0.5")),
    # These change the teacher's FLOPs, of which the budget is a fraction.
    (["teacher.epochs=3"], TWO, TWO),
    ([T + "batch_rows=64"], TWO, TWO),
    *((["teacher.model." + key], TWO, TWO) for key in SIZES),
    *(([S + key], TWO, {"plain", "baseline"}) for key in (*OPTIMISER, "batch_rows=16")),
    (["students.model.hidden_size=32"], TWO, {"plain", "baseline"}),
    (["students.model.initializer_range=0.1"], TWO, {"plain", "baseline"}),
    (["students.budget=0.7"], TWO, {"plain", "baseline"}),
    # The control `shuffled` copies the first recipe, and `smoothed` takes the entropy of its
    # outputs.
    ([R + "plain.temperature=3"], PLAIN, {"plain", "shuffled"}),
    ([R + "plain.objective=reverse_kl"], PLAIN, {"plain", "shuffled"}),
    ([R + "plain.divergence.temperature_squared=false"], PLAIN, {"plain", "shuffled"}),
    ([R + "plain.outputs.transfer_rows=96"], PLAIN, {"plain", "shuffled", "smoothed"}),
    ([R + "plain.outputs.charged=false"], PLAIN, {"plain", "shuffled"}),
    ([R + "plain.student.learning_rate=0.005"], PLAIN, {"plain", "shuffled"}),
    ([R + "plain.student.budget_fraction=0.9"], PLAIN, {"plain", "shuffled"}),
    ([R + "plain.student.model={hidden_size: 24, num_hidden_layers: 1, num_attention_heads: 2}"],
     PLAIN, {"plain", "shuffled"}),
    # Recipes do not reach each other, so several are changed at a time.
    ([R + "jsd.divergence.beta=0.3", R + "top.outputs.k=3", R + "own.student.temperature=0.5",
      R + "states.outputs.layers=[2]", R + "annealed.temperature.start=4"],
     ALL, {"jsd", "top", "own", "states", "annealed"}),
    ([R + "skewed.divergence.skew=0.3", R + "drawn.outputs.k=3", R + "mixed.student.on_policy=0.8",
      R + "written.outputs.temperature=0.5", R + "few.control.label_fraction=0.25",
      R + "averaged.teachers=[second_teacher]"],
     ALL, {"skewed", "drawn", "mixed", "written", "few", "averaged"}),
    ([R + "annealed.temperature.end=2", R + "states.objective.hidden_mse.until=0.9",
      R + "top.access=sampled"],
     {"teacher", "plain", "annealed", "states", "top"}, {"annealed", "states", "top"}),
    ([R + "annealed.temperature.until=0.4", R + "states.objective.hidden_mse.end=0.2"],
     {"teacher", "plain", "annealed", "states"}, {"annealed", "states"}),
    ([R + "annealed.objective={forward_kl: 0.4, cross_entropy: 0.6}",
      R + "states.objective={forward_kl: 0.6, hidden_mse: {start: 0.4, end: 0, until: 0.5}}"],
     {"teacher", "plain", "annealed", "states"}, {"annealed", "states"}),
    (["checkpoint_seconds=0", "checkpoint_steps=1", "log_every=1", "workers=1",
      "cost.price_per_hour=9", "cost.currency=EUR", "cost.watts_per_thread=9",
      "verdicts=[{claim: plain beats baseline}]", "compare={against: [baseline]}"], TWO, set()),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The models of the config without a change."""
    return trained(tmp_path_factory.mktemp("base"), CONFIG)


def trained(folder, config, *overrides) -> dict[str, str]:
    """{model: sha256}; students of the first seed."""
    file = folder / "config.yaml"
    file.write_text(json.dumps(config), "utf-8")
    assert train.main([str(file), *overrides, "--runs", str(folder)]) == 0
    hashes = tensor_hashes(folder / config["name"]).items()
    first = f"/seed-{config['seeds'][0]}"
    return {
        stage.removeprefix("students/").removesuffix(first): digest
        for stage, digest in hashes
        if not stage.startswith("outputs")
    }


def part(names: set[str], **changed) -> dict:
    """The config with these models alone."""
    recipes = {name: recipe for name, recipe in RECIPES.items() if name in names}
    controls = [name for name in CONFIG["controls"] if name in names]
    return {**CONFIG, "recipes": recipes, "controls": controls, **changed}


@pytest.mark.parametrize(
    ("overrides", "names", "changed"), CASES, ids=[case[0][0].partition("{")[0] for case in CASES]
)
def test_a_key_changes_what_it_is_about_and_nothing_else(overrides, names, changed, base, tmp_path):
    found = trained(tmp_path, part(names), *overrides)
    assert set(found) == names
    assert {name for name in names if found[name] != base[name]} == changed


def test_every_seed_is_a_student_of_the_same_teacher_and_equals_the_one_trained_alone(
    base, tmp_path
):
    both = trained(tmp_path, part({"plain", "baseline"}, seeds=[0, 1], name="both"))
    alone = trained(tmp_path, part({"plain", "baseline"}, seeds=[1], name="alone"))
    assert both["teacher"] == alone["teacher"] == base["teacher"]
    for name in ("plain", "baseline"):
        assert both[name] == base[name] != alone[name] == both[f"{name}/seed-1"]


def test_every_key_that_a_user_may_set_is_changed_here_or_elsewhere():
    """A new key must be added to CASES, or here with the reason."""
    elsewhere = {
        "name", "threads", "seeds", "controls", "prompts",  # which runs there are, and where
        "accumulation",  # equal up to rounding, see test_train.py
        "pretrained", "architecture", "num_attention_heads",  # see tests/models
        "group", "traces",  # of reasoning, see tests/tasks/test_reason.py
        "initial_layers", "tflops",  # see tests/experiment
        "shuffled", "smoothed", "sequences", "seed",  # in RECIPES and controls above
        # see tests/experiment/test_tuning.py
        "gold", "tune", "tuned", "validation", "tries", "config", "flops", "seconds", "joules",
        "money", "other_rates",
        # see tests/teacher/test_endpoint.py and tests/experiment/test_collecting.py
        "api", "url", "key_env", "endpoint", "body", "at_once", "price_in", "price_out",
        "budget_tokens", "budget_money", "allows_distillation", "permission", "evaluation_rows",
        # see tests/experiment/test_evidence.py and test_evidence_study.py
        "watermark", "watermark_key", "watermark_share", "canaries",
        "antidistillation", "proxy",  # see tests/teacher/test_antidistillation.py
        "revision", "dtype", "attention",  # see tests/models/test_pretrained_models.py
        "autocast", "activation_checkpointing", "compile",  # see tests/experiment/test_precision.py
        # see tests/tasks/test_instruct.py
        "published", "source", "parameters", "tokens", "licence",
        "trackers",  # see tests/experiment/test_log.py
        "exploratory",  # see tests/measure/test_verdicts.py
        "claim", "metric", "threshold", "split", "against", "metrics",  # in the run made by hand
    }  # fmt: skip
    tried = " ".join(key for case in CASES for key in case[0])
    for section in sections(Config):
        for key in section.model_fields:
            assert key in elsewhere or key in tried, f"{section.__name__}.{key}"


def sections(section, found=None):
    """All sections of a config."""
    found = found if found is not None else []
    if section not in found:
        found.append(section)
        for field in section.model_fields.values():
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            for kind in kinds:
                if isinstance(kind, type) and hasattr(kind, "model_fields"):
                    sections(kind, found)
    return found
