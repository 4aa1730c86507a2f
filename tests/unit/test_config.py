"""Where settings come from, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lowbit_server.config import Config, ConfigError, load_config, read_tokens
from tests.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("LOWBIT_"):
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "lowbit.toml"
        path.write_text(text)
        return path

    return write


def test_defaults_are_valid_and_frozen() -> None:
    config = load_config(None, {})
    assert config.devices == ("cpu",)
    assert config.home.is_absolute()
    assert "~" not in str(config.home)
    with pytest.raises(Exception, match="frozen"):
        config.listen = "127.0.0.1:1"  # type: ignore[misc]


def test_flags_win_over_variables_and_variables_over_the_file(
    file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file('listen = "127.0.0.1:1"\nworkers_per_device = 2\nmax_running_jobs = 3\n')
    monkeypatch.setenv("LOWBIT_LISTEN", "127.0.0.1:4")
    monkeypatch.setenv("LOWBIT_WORKERS_PER_DEVICE", "5")
    config = load_config(path, {"listen": "127.0.0.1:6"})
    assert (config.listen, config.workers_per_device, config.max_running_jobs) == (
        "127.0.0.1:6",
        5,
        3,
    )


def test_lists_come_as_toml_arrays_or_separated_values(
    file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert load_config(file('devices = ["cpu", "cuda:1"]'), {}).devices == ("cpu", "cuda:1")
    monkeypatch.setenv("LOWBIT_DEVICES", "cuda:0,cpu")
    (tmp_path / "a").mkdir()
    monkeypatch.setenv("LOWBIT_IMPORT_ROOTS", f"{tmp_path}{os.pathsep}{tmp_path / 'a'}")
    config = load_config(None, {})
    assert config.devices == ("cuda:0", "cpu")
    assert config.import_roots == (tmp_path, tmp_path / "a")


def test_import_roots_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    config = load_config(None, {"import_roots": [tmp_path / "link"]})
    assert config.import_roots == (tmp_path / "real",)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("lissten = 1", "lissten"),
        ("workers_per_device = 0", "workers_per_device"),
        ('log_level = "loud"', "log_level"),
        ("listen = [", "lowbit.toml"),
    ],
)
def test_what_the_file_has_wrong_is_named(
    file: Callable[[str], Path], text: str, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(file(text), {})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load_config(tmp_path / "absent.toml", {})


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("LOWBIT_LISTENN", "x", "LOWBIT_LISTENN"),
        ("LOWBIT_LISTEN", "localhost", "listen"),
        ("LOWBIT_KV_CACHE_BYTES", "many", "kv_cache_bytes"),
        ("LOWBIT_DRAIN_GRACE_S", "nan", "drain_grace_s"),
        ("LOWBIT_WORKER_HANG_TIMEOUT_S", "nan", "worker_hang_timeout_s"),
        ("LOWBIT_WORKER_PING_INTERVAL_S", "inf", "worker_ping_interval_s"),
    ],
)
def test_what_a_variable_has_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, named: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=named):
        load_config(None, {})


def test_the_clients_own_variables_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_ADDRESS", "elsewhere:1")
    assert load_config(None, {}).listen == "127.0.0.1:50151"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"devices": []}, "devices"),
        ({"devices": ["cpu", "cpu"]}, "devices"),
        ({"devices": ["gpu"]}, "gpu"),
        ({"devices": ["cuda"]}, "cuda"),
        ({"listen": "127.0.0.1:65536"}, "65536"),
        ({"listen": ":50151"}, "listen"),
        ({"listen": "::1:50151"}, "listen"),
        ({"import_roots": ["/no/such/folder"]}, "/no/such/folder"),
        ({"max_message_bytes": 1}, "max_message_bytes"),
        ({"worker_ping_interval_s": 0}, "worker_ping_interval_s"),
    ],
)
def test_what_a_flag_has_wrong_is_named(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(None, flags)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "localhost:50151", "[::1]:50151"])
def test_addresses_that_are_good(listen: str) -> None:
    assert load_config(None, {"listen": listen}).listen == listen


def test_a_relative_home_is_made_absolute() -> None:
    assert Config(home=Path("here")).home == Path.cwd() / "here"


def test_tls_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    one, other = Authority(tmp_path, "one").issue("server"), Authority(tmp_path, "two").issue("b")
    ca = tmp_path / "one.pem"
    good = {"tls_certificate": one.certificate, "tls_key": one.key, "tls_client_ca": ca}
    assert load_config(None, good).tls_key == one.key
    for wrong in (
        {"tls_key": None},
        {"tls_key": other.key},
        {"tls_key": tmp_path / "nothing"},
        {"tls_client_ca": one.key},
        {"tls_certificate": None, "tls_key": None},
    ):
        with pytest.raises(ConfigError, match="tls_"):
            load_config(None, good | wrong)


def test_tokens_are_read_a_line_each(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# people\none\n\n  two.2-~+/==  \n")
    assert load_config(None, {"tokens_file": file}).tokens_file == file
    assert read_tokens(file) == ("one", "two.2-~+/==")


@pytest.mark.parametrize("text", ["", "# none\n", "two words\n", "ü\n"])
def test_a_file_without_good_tokens_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(ConfigError, match="tokens_file") as caught:
        load_config(None, {"tokens_file": file})
    assert "two words" not in str(caught.value)
    with pytest.raises(ConfigError, match="tokens_file"):
        load_config(None, {"tokens_file": tmp_path / "nothing"})
