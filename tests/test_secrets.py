"""Secrets and references: they reach the backend, and no error, repr, document, log or figure shows them."""

from __future__ import annotations

import json
import logging
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from conftest import Install
from helpers import SLOT_BYTES
from pydantic import BaseModel, Secret, SecretBytes, SecretStr

from flexkv_core.cli.main import main
from flexkv_core.config import dump_with_secrets, load_config, load_stack
from flexkv_core.config.secrets import is_secret_field, is_secret_name
from flexkv_core.errors import StackConfigError
from flexkv_core.manager import KVCacheManager

SECRET = "hunter2-hunter2"
VAULT = """
    import os
    from pathlib import Path
    from typing import Annotated
    from pydantic import AfterValidator, BaseModel, Field, SecretStr, model_validator
    import flexkv_core.backend as fk

    def even(value):
        if len(value) % 2:
            raise ValueError(f"{value.upper()} has an odd length")
        return value

    def never(value):
        if os.environ.get("REFUSE_IN_TIER"):
            raise ValueError(f"refused: {value.get_secret_value()}")
        return value

    class Login(BaseModel):
        user: str
        auth: SecretStr

    class Config(fk.BackendConfig):
        out: Path
        auth: Annotated[SecretStr, AfterValidator(never)]
        login: Login | None = None
        more: dict[str, SecretStr] = {}
        endpoint: str = "x"
        pair: Annotated[str, AfterValidator(even)] = ""
        number: int = 0

    class Vault(fk.Backend):
        capabilities = fk.Capabilities(addressing="key")

        def __init__(self, config):
            self.config = config

        def open(self, context):
            found = [self.config.auth.get_secret_value()]
            if self.config.login:
                found.append(self.config.login.auth.get_secret_value())
            found += [value.get_secret_value() for value in self.config.more.values()]
            self.config.out.write_text(repr((found, self.config.endpoint)))
            context.logger.warning("config is %r", self.config.auth)

        def read(self, batch):
            return [fk.Status.MISSING] * len(batch)

        def write(self, batch):
            return [fk.Status.FAILED] * len(batch)

        def close(self):
            pass

    @fk.hookimpl
    def flexkv_backend():
        return fk.BackendSpec("vault", Config, Vault, contract_version=1, addressing="key")
"""


@pytest.fixture
def vault(install_plugin: Install, tmp_path: Path) -> dict[str, Any]:
    """A tier with a literal secret, referenced ones, and a reference in a plain string."""
    install_plugin("vault", VAULT)
    return {
        "backend": "vault",
        "out": str(tmp_path / "seen"),
        "auth": SECRET,
        "login": {"user": "me", "auth": "${LOGIN}"},
        "more": {"a": "${LOGIN}", "b": f"{SECRET}-b"},
        "endpoint": "https://${LOGIN}@host/$${x}",
    }


def stack(tier: dict[str, Any]) -> dict[str, Any]:
    return {"tiers": [{"backend": "cpu", "capacity": 16 * SLOT_BYTES}, tier]}


LOGIN = "swordfish-swordfish"
ENVIRON = {"LOGIN": LOGIN}


def hidden(text: str) -> bool:
    return SECRET not in text and LOGIN not in text and SECRET.upper() not in text and LOGIN.upper() not in text


@pytest.mark.parametrize("isolation", ["process", "none"])
def test_secrets_reach_the_tier_intact_and_nothing_else(
    isolation: str, vault: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = tmp_path / "seen"
    config = load_stack(stack({**vault, "isolation": isolation}), ENVIRON)
    with caplog.at_level(logging.DEBUG), KVCacheManager.open(config) as manager:
        deadline = time.monotonic() + 20
        while manager.stats()["tiers"]["vault"]["state"] != "ready":
            assert time.monotonic() < deadline, manager.stats()
            time.sleep(0.01)
        assert hidden(repr(manager.stats()))
    assert seen.read_text() == repr(([SECRET, LOGIN, LOGIN, f"{SECRET}-b"], f"https://{LOGIN}@host/${{x}}"))
    assert "config is SecretStr" in caplog.text
    assert hidden(caplog.text)


def test_a_config_refused_in_the_tiers_process_shows_no_secret(
    vault: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_stack(stack(vault), ENVIRON)
    monkeypatch.setenv("REFUSE_IN_TIER", "1")
    with caplog.at_level(logging.DEBUG), KVCacheManager.open(config) as manager:
        deadline = time.monotonic() + 20
        while manager.stats()["tiers"]["vault"]["state"] != "backoff":
            assert time.monotonic() < deadline, manager.stats()
            time.sleep(0.01)
        figures = repr(manager.stats())
    assert "not accepted in the tier's process: auth: value_error" in figures + caplog.text
    assert hidden(figures + caplog.text)


def test_reprs_and_documents_show_references_and_stars(vault: dict[str, Any]) -> None:
    loaded = load_config(stack(vault), {**ENVIRON, "FLEXKV_REDIS_PASSWORD": SECRET})
    tier = loaded.stack.tiers[1]
    for shown in (repr(loaded), str(loaded), repr(loaded.stack), repr(tier), repr(tier.options), str(tier.options)):
        assert hidden(shown)
    document = loaded.document["tiers"][1]
    assert document["endpoint"] == "https://${LOGIN}@host/$${x}"
    assert document["auth"] == "***"
    assert "${LOGIN}" in repr(tier)
    assert loaded.settings.sharing.redis_password == SecretStr(SECRET)
    assert loaded.values["redis_password"].written == "***"


@pytest.mark.parametrize(
    ("changes", "key", "told"),
    [
        ({"auth": 7777777}, "tiers[1].auth", "valid string (its value is not shown)"),
        ({"auth": [SECRET]}, "tiers[1].auth", "not shown"),
        ({"login": {"user": "me", "auth": 7777777}}, "tiers[1].login.auth", "not shown"),
        ({"login": {"usr": "me", "auth": SECRET}}, "tiers[1].login", "the key user is missing"),
        ({"auth": None}, "tiers[1].auth", "valid string"),
        ({"pair": "${ODD}"}, "tiers[1].pair", "${ODD}: this value is not accepted"),
        ({"number": "${LOGIN}"}, "tiers[1].number", "${LOGIN}: input should be a valid integer"),
        ({"auht": SECRET}, "tiers[1].auht", "did you mean 'auth'"),
        ({"password": SECRET}, "tiers[1].password", "unknown key"),
        ({"name": "${LOGIN}"}, "tiers[1].name", "a reference is for secrets and paths"),
        ({"backend": "${LOGIN}"}, "tiers[1].backend", "a reference is for secrets and paths"),
        ({"endpoint": "${LOGIN"}, "tiers[1].endpoint", "begins a reference"),
        ({"endpoint": "${MISSING}"}, "tiers[1].endpoint", "the environment has no variable MISSING"),
    ],
)
def test_errors_show_none(changes: dict[str, Any], key: str, told: str, vault: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "stack.yaml"
    file.write_text(yaml.safe_dump(stack({**vault, **changes})))
    with pytest.raises(StackConfigError) as caught:
        load_stack(file, {**ENVIRON, "ODD": f"{LOGIN[:-2]}-odd"[: 2 * 8 + 1]})
    error = caught.value
    assert told in str(error)
    assert error.key == key
    assert error.line is not None
    assert hidden("".join(traceback.format_exception(error)) + repr(error.value))
    assert "swordfish" not in str(error).lower()
    assert "7777777" not in "".join(traceback.format_exception(error)) + repr(error.value)
    assert error.__context__ is None, "pydantic's own error shows values"


@pytest.mark.parametrize(
    "text",
    ["redis_password: [hunter2-hunter2", "redis_password: 'hunter2-hunter2", "a: hunter2-hunter2: b"],
)
def test_a_file_that_cannot_be_parsed_shows_no_line_of_itself(text: str, tmp_path: Path) -> None:
    for name in ("x.yaml", "x.json"):
        file = tmp_path / name
        file.write_text(text if name == "x.yaml" else json.dumps({"redis_password": SECRET})[:-2])
        with pytest.raises(StackConfigError) as caught:
            load_config(file, {})
        assert hidden("".join(traceback.format_exception(caught.value)))


def test_validate_prints_none(vault: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGIN", LOGIN)
    monkeypatch.setenv("FLEXKV_REDIS_PASWORD", SECRET)
    file, figures = tmp_path / "stack.yaml", tmp_path / "figures.json"
    for document in (stack(vault), {"redis_password": SECRET, "ssd_cache_dir": "${LOGIN}"}):
        file.write_text(yaml.safe_dump(document))
        result = CliRunner().invoke(main, ["validate", "--config", str(file), "--json", str(figures)])
        assert result.exit_code == 0, result.output
        assert hidden(result.output + figures.read_text())
        assert "***" in result.output
        assert "${LOGIN}" in result.output
        assert "did you mean FLEXKV_REDIS_PASSWORD" in result.output


def test_references_in_flat_files(tmp_path: Path) -> None:
    loaded = load_config({"redis_password": "${LOGIN}", "redis_host": "${HOST}.local"}, {**ENVIRON, "HOST": "h"})
    assert loaded.settings.sharing.redis_password == SecretStr(LOGIN)
    assert loaded.settings.sharing.redis_host == "h.local"
    assert loaded.values["redis_password"].written == "${LOGIN}"
    assert hidden(repr(loaded))
    with pytest.raises(StackConfigError, match=r"^<mapping>: server_recv_port: \$\{LOGIN\}: must be a Unix socket"):
        load_config({"server_recv_port": "${LOGIN}"}, ENVIRON)
    with pytest.raises(StackConfigError, match="put it in quotes") as caught:
        load_config({"redis_password": 7777777}, {})
    assert "7777777" not in str(caught.value) + repr(caught.value.value)


def test_what_is_put_in_is_not_looked_at_again() -> None:
    tier = {"backend": "directory", "root": "${A}${B}/$${C}/$x/$$/${A}"}
    loaded = load_stack({"tiers": [tier]}, {"A": "${B}", "B": "$${", "C": "c"})
    assert str(loaded.tiers[0].options.model_dump()["root"]) == "${B}$${/${C}/$x/$$/${B}"
    assert load_stack({"tiers": [{**tier, "root": "$A$"}]}, {}).tiers[0].options.model_dump()["root"] == Path("$A$")


def test_dumps_keep_secrets_of_every_shape() -> None:
    class Inner(BaseModel):
        key: SecretStr

    class Outer(BaseModel):
        plain: Path = Path("/x")
        text: SecretStr = SecretStr("t")
        raw: SecretBytes = SecretBytes(b"b")
        number: Secret[int] = Secret[int](7)
        many: list[SecretStr] = [SecretStr("1"), SecretStr("2")]
        pairs: dict[str, tuple[SecretStr, int]] = {"p": (SecretStr("x"), 1)}
        inner: Inner = Inner(key=SecretStr("k"))
        none: SecretStr | None = None

    dumped = dump_with_secrets(Outer())
    assert dumped == {
        "plain": "/x",
        "text": "t",
        "raw": b"b",
        "number": 7,
        "many": ["1", "2"],
        "pairs": {"p": ["x", 1]},
        "inner": {"key": "k"},
        "none": None,
    }
    assert Outer.model_validate(dumped) == Outer()
    for field in ("text", "raw", "number", "many", "pairs", "inner", "none"):
        assert is_secret_field(Outer, (field,))
    assert is_secret_field(Outer, ("inner", "key"))
    assert not is_secret_field(Outer, ("plain",))
    assert not is_secret_field(Outer, ("unknown", 3))


def test_names_of_secrets() -> None:
    for name in ("password", "redis_password", "secret_access_key", "api-key", "TOKEN", "session_token", "credentials"):
        assert is_secret_name(name), name
    for name in ("tokens", "max_tokens", "key", "capacity", "bypass", "keyboard", "secretary"):
        assert not is_secret_name(name), name
