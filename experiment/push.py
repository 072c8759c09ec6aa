"""Upload a student, with its model card, to the Hugging Face hub."""

import os

from huggingface_hub import HfApi

from configs.files import say
from configs.schema import LabError, nearest
from experiment.experiment import verified
from experiment.plan import Plan
from experiment.run import Run


def push(run: Run, name: str | None, repository: str) -> int:
    """Upload the first student of a recipe or control, by default of the first recipe, as a private
    repository. LabError if the hub refuses it."""
    plan = Plan(run.config())
    name = name or next(iter(plan.recipes))
    if name not in plan.recipes:
        raise LabError(
            f"--student: no student or control {name!r}{nearest(name, plan.recipes)}; there are "
            f"{', '.join(plan.recipes)}"
        )
    stage = plan.stage(name)
    folder = verified(run, stage)
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"{stage} of {run.folder.name}"
        )
    except Exception as error:  # of the hub, of its client, and of the network
        reason = " ".join(str(error).split())[:200]
        raise LabError(
            f"{repository} was not uploaded ({type(error).__name__}: {reason}); log in with `hf "
            "auth login`, or set HF_TOKEN"
        ) from None
    say(f"{stage} is at {hub.endpoint}/{repository}; a new repository is private")
    return 0
