"""Answers of several models side by side, and what else the teacher considered."""

import base64
import io
from typing import Any

import matplotlib.image
import numpy as np
import torch

from measure.evaluate import Evaluation, TeacherReference, completion_logits
from models.rows import Rows
from tasks.task import Task

OF_A_KIND = 12  # answers of each kind
EXAMPLES = 6  # answers in eval.json and in documents
UNCERTAIN = 4  # rows whose distributions are shown
SHOWN_POSITIONS = 20  # of each at most


def shown_rows(task: Task, rows: Rows, count: int) -> list[int]:
    """The rows that stand for a split: familiar ones and, where there are none, evenly spaced ones.
    No model has a say in it."""
    if task.familiar:
        places = {task.question(rows, i): i for i in range(len(rows))}
        found = [places[question] for question in task.familiar if question in places]
        if found:
            return found[:count]
    return [i * len(rows) // count for i in range(count)]


def examples(
    reference: TeacherReference, first: dict[str, Evaluation], models: list[str]
) -> list[dict[str, Any]]:
    """A few rows for eval.json: {"question", "truths", "answers": {model: {"text", "grade"}}}."""
    found = []
    for i in shown_rows(reference.task, reference.rows, EXAMPLES):
        row = side_by_side(reference, first, models, i)
        answers = dict(zip(models, row["answers"], strict=True))
        found.append({"question": row["question"], "truths": row["truths"], "answers": answers})
    return found


def filters_of(
    reference: TeacherReference, first: dict[str, Evaluation], main: str
) -> dict[str, np.ndarray]:
    """{kind of answer: which rows [N]}, about the first student."""
    teacher, student = reference.evaluation, first[main]
    same = np.array(
        [a == b for a, b in zip(teacher.answers.texts, student.answers.texts, strict=True)]
    )
    found = {f"{main} differs from the teacher": ~same}
    if "wrong" in student.columns:
        wrong, teacher_wrong = student.columns["wrong"] > 0, teacher.columns["wrong"] > 0
        found |= {
            f"{main} is right": ~wrong,
            f"{main} is wrong": wrong,
            "copied mistakes": teacher_wrong & same,
        }
    if "far" in student.columns:
        found["far from training words"] = student.columns["far"] > 0
    return found


def chosen_answers(
    reference: TeacherReference, first: dict[str, Evaluation], models: list[str]
) -> list[dict[str, Any]]:
    """The first rows of every kind, by id (a hash), with the kinds that they are of."""
    order = np.argsort(reference.rows.ids)
    kinds = filters_of(reference, first, models[1])
    chosen = {int(i) for rows in kinds.values() for i in order[rows[order]][:OF_A_KIND]}
    return [
        side_by_side(reference, first, models, int(i))
        | {"kinds": [number for number, rows in enumerate(kinds.values()) if rows[i]]}
        for i in order
        if int(i) in chosen
    ]


def side_by_side(
    reference: TeacherReference, first: dict[str, Evaluation], models: list[str], i: int
) -> dict[str, Any]:
    """A row: the question, the right answers, each model's answer and grade. Where the task does
    not grade answers there are no grades."""
    task, rows = reference.task, reference.rows
    answers = []
    for name in models:
        evaluation = first[name]
        grade = ""
        if "wrong" in evaluation.columns:
            grade = "wrong" if evaluation.columns["wrong"][i] else "right"
        answers.append({"text": evaluation.answers.texts[i], "grade": grade})
    return {
        "question": task.question(rows, i),
        "image": image_of(task, rows, i),
        "truths": task.truths(task.question(rows, i)),
        "answers": answers,
    }


def image_of(task: Task, rows: Rows, i: int) -> str | None:
    """The image of a row, as a PNG data URI."""
    pixels = task.image(rows, i)
    if pixels is None:
        return None
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, pixels, cmap="gray_r", vmin=0, vmax=255, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def dark_knowledge(reference: TeacherReference) -> list[dict[str, Any]]:
    """Familiar rows, or else those that the teacher is least certain of, with its most likely
    tokens per position."""
    task, rows = reference.task, reference.rows
    if not reference.compares_tokens:
        return []
    columns = reference.evaluation.columns
    uncertainty = columns["entropy"] / columns["positions"]
    uncertain = np.argsort(uncertainty, kind="stable")[::-1]
    shown = []
    for i in shown_rows(task, rows, UNCERTAIN) if task.familiar else uncertain[:UNCERTAIN]:
        logits, _, _ = completion_logits(reference.teacher, task, rows, np.array([i]))
        top = torch.softmax(logits, dim=-1).topk(min(5, task.vocabulary), dim=-1)
        positions = [
            {
                "target": task.token_name(target),
                "top": [
                    (task.token_name(token), p) for token, p in zip(tokens, shares, strict=True)
                ],
            }
            for target, tokens, shares in zip(
                rows.completion(i), top.indices.tolist(), top.values.tolist(), strict=True
            )
        ]
        question, image = task.question(rows, i), image_of(task, rows, i)
        shown.append(
            {"question": question, "image": image, "positions": positions[:SHOWN_POSITIONS]}
        )
    return shown
