"""Errors in OpenAI's shape, by which its client chooses its exception and whether to try again."""

from typing import Any

from fastapi.responses import JSONResponse

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """retry_after: seconds after which it is worth trying again; None: never."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.param, self.retry_after = param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        found = {
            "message": self.message,
            "type": TYPES.get(self.status, "invalid_request_error"),
            "param": self.param,
        }
        return {"error": found | {"code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The client retries some statuses by itself unless a header forbids it."""
        if self.retry_after is None:
            return {"x-should-retry": "false"}
        return {"retry-after": f"{max(1, round(self.retry_after + 0.5))}", "x-should-retry": "true"}

    def response(self, request_id: str | None = None) -> JSONResponse:
        headers = self.headers | ({"x-request-id": request_id} if request_id else {})
        return JSONResponse(self.body, self.status, headers)
