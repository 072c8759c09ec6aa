"""What an endpoint sells to a key: at which price, under which terms."""

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, DefaultHttpxClient, OpenAI

from configs.schema import Api, LabError
from teacher.api.tiers import PER_MILLION

RETRIES = 5  # of a request that fails for reasons of the network or the server
PATIENCE = 600.0  # seconds for one answer


@dataclass(frozen=True)
class Offer:
    """What an endpoint sells to a key, and on which terms. access and k: what it reveals; None if
    it does not say."""

    url: str
    model: str
    key: str = field(repr=False)
    price_in: float  # per million tokens
    price_out: float
    access: str | None = None
    k: int = 0
    terms: str = "unknown"  # their version
    terms_text: str = ""
    allows_distillation: str = "unknown"

    @classmethod
    def of(cls, url: str, model: str, key: str, settings: Api) -> "Offer":
        """As the server states it (`/v1/account`, which most do not have) or else as the config
        does. LabError if it cannot be reached or does not know the key."""
        try:
            with client_of(url, key) as client:
                found = client.get("/account", cast_to=object)
            tier, terms = found["tier"], found["terms"]
        except (APIStatusError, APIConnectionError, TypeError, KeyError, ValueError) as error:
            states_it = getattr(error, "status_code", None) not in (404, 405)
            if states_it and isinstance(error, APIStatusError | APIConnectionError):
                raise problem(url, error) from None
            return cls(
                url, model, key, settings.price_in, settings.price_out,
                allows_distillation=settings.allows_distillation,
            )  # fmt: skip
        return cls(
            url, model, key, tier["price_in"], tier["price_out"], tier["access"], tier["k"],
            terms["version"], terms["text"], terms["allows_distillation"],
        )  # fmt: skip

    def money(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (self.price_in * prompt_tokens + self.price_out * completion_tokens) / PER_MILLION


def client_of(url: str, key: str) -> OpenAI:
    """OpenAI's client; to this machine it goes straight, whatever proxy the environment names."""
    local = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    return OpenAI(
        base_url=url, api_key=key, max_retries=RETRIES, timeout=PATIENCE,
        http_client=DefaultHttpxClient(trust_env=not local),
    )  # fmt: skip


def problem(url: str, error: APIStatusError | APIConnectionError) -> LabError:
    """One line about a request that will not pass."""
    if isinstance(error, APIStatusError):
        return LabError(f"{url}: {error.message}")
    return LabError(f"{url} does not answer ({error.__cause__})")
