"""Rules: invalid combinations are rejected in one line when the config is read."""

import pytest

from tests.helpers import train_tiny


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.epoch=3"], "unknown key 'teacher.epoch'; did you mean 'epochs'?"),
        (["recipes.distilled.acess=text"], "did you mean 'access'?"),
        (["teacher.epochs=many"], "teacher.epochs: found 'many'"),
        (["seeds=[0, 0]"], "seeds [0, 0] repeat"),
        (["students.budget=-1"], "students.budget: found -1"),
        (["recipes.distilled.access=text"], "access 'text' reveals none"),
        (["recipes.distilled.objective=forward_lk"], "did you mean 'forward_kl'?"),
        (["recipes.distilled.objective={forward_kl: 2}"], "sum to 2, expected 1"),
        (["recipes.states.access=logits"], "access hidden and objectives over hidden states"),
        (["recipes.states.outputs.layers=[]"], "outputs.layers names the teacher's layers"),
        (["recipes.states.outputs.layers=[2]"], "expected 1 layers, one for each of the student's"),
        (["recipes.states.objective=hidden_mse"], "the output layer is not trained"),
        (["recipes.top.temperature=2"], "temperature other than 1 needs access logits or hidden"),
        (["students.model.hidden_size=15"], "not a multiple of num_attention_heads"),
        (["teacher.model.architecture=lama"], "'lama' is unknown to transformers"),
        (["teacher.model.settings.rope=1"], "model.settings.rope is not a setting of llama"),
        (["students.budget=0.000001"], "leaves no FLOPs for training"),
        (["nonsense"], "must read key=value"),
        (
            [
                "recipes={t: {access: text, sequences: teacher, objective: cross_entropy}}",
                "controls=[smoothed]",
                "verdicts=[]",
            ],
            "it needs a recipe with access logits or hidden, and not sequences student",
        ),
        (["students.budget=5"], "such as 0.05 for 5 %; for more than 1, set tflops instead"),
        (["recipes.distilled.temperature=1e6"], "above 0 and at most 100.0, where all outcomes"),
        (["seeds=[true]"], "seeds.0: found true, expected a number"),
        (["teacher.epochs=true"], "teacher.epochs: found true, expected a number"),
        (["seeds=[]"], "seeds: found [], expected at least 1"),
        (["controls=[baseline]"], "'shuffled'; add shuffled to controls, or remove the verdict"),
        (["name=a/b"], "name: found 'a/b', expected letters, digits, '.', '_' and '-' only"),
        (["task={limit: &a 3, name: *a}"], "aliases"),
        (["task=!!python/object:os.system {}"], "not plain YAML"),
        (["task={limit: 300, limit: 600}"], "the key 'limit' is given twice"),
        (["threads=1001"], "threads: found 1001"),
        (["seeds=" + str(list(range(1001)))], "seeds: found"),
        (["seeds=[4294967296]"], "seeds.0: found 4294967296"),
        (["students.model.num_hidden_layers=1001"], "num_hidden_layers: found 1001"),
        (
            ["teacher.model.hidden_size=100000", "teacher.model.num_hidden_layers=1000"],
            "billion parameters need",
        ),
        (["task=" + "a" * 1_000_001], "1,000,001 characters, expected at most 1,000,000"),
        (["verdicts=[{claim: distiled beats baseline}]"], "did you mean 'distilled'?"),
        (
            ["verdicts=[{claim: distilled beats baseline, metric: words}]"],
            "task pronounce has no metric 'words'",
        ),
        (["verdicts=[{claim: distilled matches baseline}]"], "needs a threshold above 0"),
        (
            ["verdicts=[{claim: top keeps baseline, metric: sequence_agreement, threshold: 95}]"],
            "expected the fraction to keep",
        ),
        (
            ["verdicts=[{claim: top keeps baseline, metric: word_error_rate, threshold: 0.9}]"],
            "use matches or beats",
        ),
        (["recipes.teacher={access: logits}"], "is the name of the teacher or a control"),
        (["seeds=[-1]"], "seeds.0: found -1"),
        (
            ["verdicts=[{claim: top beats baseline, metric: ece, threshold: -0.1}]"],
            "a worse model beats nothing",
        ),
        (
            ["verdicts=[{claim: top beats baseline}, {claim: top beats baseline}]"],
            "is there twice; remove one",
        ),
        (
            [
                "recipes.top.student.seeds=1",
                "recipes.distilled.teachers=[top]",
                "recipes.distilled.student.initial_layers=[1]",
            ],
            "student.initial_layers: every student starts from one of 'top' with the same seed",
        ),
        (["teacher.training.betas=[0.9, 1.0]"], "betas.1: found 1.0"),
        (["teacher.epochs=.inf"], "teacher.epochs: found inf"),
        (["task.limit=10"], "task.limit: found 10"),
        (
            ["students.model.hidden_size=18"],
            "students of recipe distilled: model.architecture 'llama' cannot be built",
        ),
        (["recipes.top.outputs.k=73"], "recipes.top.outputs.k: found 73, expected at most 72"),
        (["recipes.top.outputs.k=0"], "recipes.top.outputs.k: found 0"),
        (["recipes.top.access=sampled"], "access sampled cannot serve objective reverse_kl"),
        (["recipes.top.teachers=[toop]"], "no teacher 'toop'; did you mean 'top'?"),
        (["recipes.top.teachers=[top]"], "need each other in a circle"),
        (["recipes.top.student.initial_layers=[1]"], "has the teacher's sizes"),
        (["recipes.invented.student.on_policy=2"], "a share of the steps, at most 1"),
        (["recipes.written.student.on_policy=1"], "cannot score what the student writes"),
        (["recipes.distilled.sequences=student"], "put another recipe first"),
        (["recipes.distilled.temperature={start: 2, end: 0}"], "must stay above 0"),
        (["recipes.distilled.temperature=.nan"], "recipes.distilled.temperature"),
        (
            ["recipes.distilled.objective={forward_kl: {start: 1, end: 0, until: 0.5}}"],
            "sum to 0 at 1 of the training",
        ),
        (
            ["recipes.distilled.objective={forward_kl: {start: 1, end: 50}}"],
            "sum to 50 at 1 of the training",
        ),
        (
            [
                "recipes.distilled={access: logits, student: {on_policy: 0.5}, "
                "objective: {forward_kl: 0.5, cross_entropy: 0.5}}"
            ],
            "the text that it writes itself",
        ),
        (["teacher.training.prompt_weight=0"], "needs teacher.training.prompt_weight > 0"),
        (
            ["recipes.distilled.outputs.transfer_rows=600"],
            "the training words; with prompts: extended there is no limit",
        ),
    ],
    ids=lambda value: value[0].split("=")[0] if isinstance(value, list) else None,
)
def test_a_config_that_cannot_work_is_rejected_in_one_line(overrides, message, tmp_path, capsys):
    assert train_tiny(tmp_path, *overrides) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
