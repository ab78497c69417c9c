"""`ApiError`: what a client is told when a request fails, in OpenAI's error shape."""

from collections.abc import Mapping
from typing import Any

from offload.errors import EngineClosed, HybridError, Overloaded, RequestError, TemplateError

RETRY_AFTER_S = 5


class ApiError(Exception):
    """An HTTP answer that is an error.

    Args:
        status: the HTTP status.
        message: for a person; says what was wrong and what would be accepted.
        kind: OpenAI's `type`, a coarse class of errors.
        param: the request's field at fault.
        code: OpenAI's `code`, which programs compare with.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str) -> ApiError:
    """503: the request is fine, the server cannot take it now."""
    return ApiError(
        503,
        message,
        kind="server_error",
        code="service_unavailable",
        headers={"retry-after": str(RETRY_AFTER_S)},
    )


def internal_error() -> ApiError:
    """500. The cause is in the server's log, not in the answer."""
    return ApiError(500, "internal error; the server's log has the cause", kind="server_error")


def from_hybrid(error: HybridError) -> ApiError:
    """What the engine raised, as a client should hear it.

    Only what a client can mend is told in full; the rest names files and is for the log, where the engine's
    thread and the routes put it.
    """
    match error:
        case Overloaded():
            return ApiError(
                429,
                str(error),
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"retry-after": str(RETRY_AFTER_S)},
            )
        case EngineClosed():
            return unavailable("the server is shutting down")
        case RequestError():
            return bad_request(str(error), error.param)
        case TemplateError():
            return bad_request(str(error))
        case _:
            return internal_error()
