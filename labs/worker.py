"""The process in which a submission runs: reads requests, writes values.

python -m labs.worker FILE    # started by the grader
"""

import json
import os
import sys
from pathlib import Path

from labs.submission import Local, SubmissionError, decoded, encoded, one_thread


def main() -> None:
    # What the submission prints goes nowhere: the original output is for replies alone.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    one_thread()
    lab = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "import" in request:
                lab, value = Local(Path(sys.argv[1])), None
            elif "read" in request:
                value = lab.read(request["read"])
            elif "call" in request:
                value = lab.call(request["call"], *decoded(request["arguments"]))
            else:
                value = lab.grad(request["grad"], *decoded(request["arguments"]))
            reply = {"value": encoded(value)}
        except (SubmissionError, TypeError) as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
