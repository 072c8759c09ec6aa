"""What a defence is worth, from the students of a run."""

import pytest
import torch

from measure.defence import UNDEFENDED, Setting, defence
from measure.report.tables import defence_name, defence_tables
from teacher.watermark import Served, Watermark, green


def student(access, prompts, kl, bias=None, temperature=1.0, k=5, budget=1.0):
    outputs = {"transfer_rows": prompts, "temperature": temperature, "k": k}
    outputs |= {"watermark": bias} if bias else {}
    return {
        "recipe": {
            "access": access, "outputs": outputs, "sequences": "teacher", "teachers": ["teacher"],
            "student": {"budget_fraction": budget},
        },
        "fidelity": {"kl_teacher_student": {"mean": kl}},
    }  # fmt: skip


def result_of(**students):
    return {"students": students}


PRICES = {UNDEFENDED: {"kl_teacher_student": 0.0}, Setting(2.0): {"kl_teacher_student": 0.3}}


def cells(found):
    return {(c["exposure"], c["prompts"], c["bias"], c["temperature"]): c for c in found["cells"]}


def test_damage_is_against_the_same_exposure_and_prompts_without_a_defence():
    found = defence(
        result_of(
            plain=student("text", 100, 0.5), marked=student("text", 100, 0.8, bias=2.0),
            more=student("text", 900, 0.4), cold=student("text", 900, 1.0, temperature=0.3),
        ),
        PRICES, {"marked": [9.0, 8.0]},
    )  # fmt: skip
    found = cells(found)
    assert found["text", 100, 2.0, 1.0]["damage"] == pytest.approx(0.3)
    assert found["text", 100, 2.0, 1.0]["z"] == [9.0, 8.0]
    assert found["text", 900, 0.0, 0.3]["damage"] == pytest.approx(0.6)
    assert found["text", 100, 0.0, 1.0]["damage"] is None


def test_only_students_of_equal_budgets_are_compared():
    found = cells(
        defence(
            result_of(
                plain=student("text", 100, 0.5),
                marked=student("text", 100, 0.8, bias=2.0, budget=0.5),
            ),
            PRICES, {},
        )
    )  # fmt: skip
    assert found["text", 100, 2.0, 1.0]["damage"] is None


def test_who_is_shown_more_could_have_learned_from_less():
    found = cells(
        defence(
            result_of(
                text=student("text", 100, 0.5), marked=student("text", 100, 0.6, bias=2.0),
                top=student("top_k", 100, 0.4), top_marked=student("top_k", 100, 0.9, bias=2.0),
                other=student("text", 900, 0.1, bias=2.0),
            ),
            PRICES, {},
        )
    )  # fmt: skip
    assert found["top_k 5", 100, 2.0, 1.0]["student"] == "marked"
    assert found["top_k 5", 100, 2.0, 1.0]["damage"] == pytest.approx(0.2)
    assert found["top_k 5", 100, 0.0, 1.0]["student"] == "top"
    assert found["text", 100, 0.0, 1.0]["student"] == "text"


def test_without_both_defended_and_other_answers_there_is_no_study():
    marked = student("text", 100, 0.8, bias=2.0)
    assert defence(result_of(marked=marked), PRICES, {}) is None
    assert defence(result_of(plain=student("text", 100, 0.5)), PRICES, {}) is None
    own_text = result_of(plain=student("text", 100, 0.5), marked=marked)
    own_text["students"]["plain"]["recipe"]["sequences"] = "data"
    assert defence(own_text, PRICES, {}) is None
    second_hand = result_of(plain=student("text", 100, 0.5), marked=marked)
    second_hand["students"]["plain"]["recipe"]["teachers"] = ["marked"]
    assert defence(second_hand, PRICES, {}) is None
    assert defence_tables({}) == []


def test_defences_have_names():
    assert defence_name({"bias": 0.0, "temperature": 1.0}) == "none"
    assert defence_name({"bias": 2.0, "temperature": 1.0}) == "watermark 2"
    assert defence_name({"bias": 0.0, "temperature": 0.3}) == "temperature 0.3"
    poisoned = Setting(antidistillation=2.0, proxy="own")
    assert defence_name(poisoned._asdict()) == "antidistillation 2 of own"
    assert defence_name(Setting(2.0, share=0.2)._asdict()) == "watermark 2 in 20%"


class Fixed(torch.nn.Module):
    """Logits that depend on the place alone."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, logits_to_keep=0, **options):
        logits = self.logits[: input_ids.shape[1]].expand(len(input_ids), -1, -1)
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})


def test_a_served_model_is_at_its_temperature_and_marked_after_every_token():
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    tokens, mark = torch.tensor([[3, 7, 2, 5]]), Watermark(11, 8, 1.5)
    served = Served(Fixed(logits), mark, 0.5)
    found = served(tokens).logits
    for place, last in enumerate(tokens[0].tolist()):
        plain = (logits[place] / 0.5).log_softmax(-1)[:8]
        expected = (plain + 1.5 * green(11, 8)[last]).log_softmax(-1)

        torch.testing.assert_close(found[0, place], expected)
    torch.testing.assert_close(served(tokens[:, :3], logits_to_keep=1).logits[0, 0], found[0, 2])
    unmarked = Served(Fixed(logits), None, 1.0)(tokens).logits
    torch.testing.assert_close(unmarked[0], logits.log_softmax(-1))
