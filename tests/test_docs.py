"""What the documents say is what the code does: names, defaults, verbs, targets, links, files."""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from gateway import endpoints, settings
from gateway.audit.record import Record
from gateway.core import errors
from gateway.core.errors import GatewayError, SettingsError
from gateway.ops import main
from gateway.telemetry.metrics import Metrics
from tests import test_architecture
from tests.support import documents
from tests.support.documents import code, links, page, section
from tests.support.project import PROJECT

ROOT = PROJECT
README = page("README.md")
PAGES = documents.pages()
EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TOP_LEVEL = {
    "gateway",
    "tests",
    "sql",
    "docs",
    "Dockerfile",
    "compose.yaml",
    "setup.cfg",
    "Makefile",
    "README.md",
    "LICENSE",
    "pyproject.toml",
}
# Pages for readers of the code may name its constants.
OF_THE_CODE = {"docs/architecture.md", ".github/CONTRIBUTING.md", "docs/decisions/0005-private-apis-for-speed.md"}
# Names of others that the pages speak of: variables of clients, tools and servers; fields and options of theirs.
OF_OTHERS = set(
    "OPENAI_BASE_URL OPENAI_API_KEY OLLAMA_HOST ANTHROPIC_BASE_URL ANTHROPIC_AUTH_TOKEN ANTHROPIC_API_KEY ANTHROPIC_MODEL "
    "ANTHROPIC_DEFAULT_HAIKU_MODEL CLAUDE_CODE_MAX_CONTEXT_TOKENS GATEWAY_KEY model_provider model_providers wire_api env_key "
    "model_context_window model_catalog_json OLLAMA_CONTEXT_LENGTH LLAMA_SERVER_URL COMPOSE_PROFILES ADMIN_KEY "
    "job_name scrape_configs credentials_file static_configs proxy_read_timeout client_max_body_size http_authorization "
    "OLLAMA_NUM_PARALLEL OLLAMA_KEEP_ALIVE NAME_FILE STATUS_LINE server_tool_use web_search_call web_search_20250305 "
    "text_stream LLAMA_SERVER_URLS".split()
)
COMPOSE_DEFAULTS = {"POSTGRES_USER": "gateway", "POSTGRES_DB": "gateway"}


def example_lines(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^(?:# )?([A-Z][A-Z0-9_]*)=(.*)$", text, re.MULTILINE)


def documented() -> dict[str, str]:
    """Names and defaults; the example of OLLAMA_BACKENDS is the one line that is no default."""
    return {name: value for name, value in example_lines(EXAMPLE) if not value.startswith("'")}


def defaults() -> dict[str, str]:
    read = {declared.name.upper(): declared.metadata["default"] for declared in settings.declarations()}
    return {**dict.fromkeys(settings.COMPOSE_ONLY, ""), **COMPOSE_DEFAULTS, **read}


def test_env_example_has_every_setting_with_its_default_and_no_other() -> None:
    assert documented() == defaults()


def test_env_example_has_every_setting_once() -> None:
    names = [name for name, value in example_lines(EXAMPLE) if not value.startswith("'")]
    assert sorted(names) == sorted(set(names))


def test_only_values_that_must_be_chosen_are_uncommented() -> None:
    assert re.findall(r"^[A-Z].*$", EXAMPLE, re.MULTILINE) == ["POSTGRES_PASSWORD=", "REDIS_PASSWORD="]


def test_env_example_marks_secrets_and_what_only_compose_reads() -> None:
    blocks = re.findall(r"((?:^#.*\n)*?)^(?:# )?([A-Z][A-Z0-9_]*)=.*$", EXAMPLE, re.MULTILINE)
    words: dict[str, str] = {}
    for comment, name in blocks:
        words[name] = words.get(name, "") + comment
    secrets = {declared.name.upper() for declared in settings.declarations() if declared.metadata["secret"]}
    assert {name for name, comment in words.items() if "[secret]" in comment and not name.endswith("_PASSWORD")} == secrets
    assert "NAME_FILE" in EXAMPLE


def test_all_of_env_example_uncommented_can_be_loaded(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(re.sub(r"^# (?=[A-Z][A-Z0-9_]*=)", "", EXAMPLE, flags=re.MULTILINE), encoding="utf-8")
    assert settings.load({}, file).gateway_bind_port == 8080


def with_example_of_backends(folder: Path, token: str) -> settings.Settings:
    (line,) = re.findall(r"^# (OLLAMA_BACKENDS='.*)$", EXAMPLE, re.MULTILINE)
    (folder / ".env").write_text(line.replace("change-me", token) + "\n", encoding="utf-8")
    return settings.load({"DATABASE_URL": "postgresql://gateway@/gateway?host=/run"}, folder / ".env")


def test_the_example_of_backends_works_when_its_token_is_replaced(tmp_path: Path) -> None:
    loaded = with_example_of_backends(tmp_path, "a-token-of-the-operator")
    assert [(backend.name, backend.kind) for backend in loaded.backends] == [("ollama", "ollama"), ("vllm", "openai")]
    assert loaded.backends[1].auth() == {"Authorization": "Bearer a-token-of-the-operator"}
    settings.refuse_weak_secrets(loaded)


def test_the_example_of_backends_is_refused_with_its_own_token(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="vllm"):
        settings.refuse_weak_secrets(with_example_of_backends(tmp_path, "change-me"))


def test_every_setting_is_used() -> None:
    code = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "gateway").rglob("*.py") if path.name != "settings.py"
    )
    names = {declared.name for declared in settings.declarations()}
    # These reach the backends through `_backends` of settings.py itself.
    in_backends = {name for name in names if name.startswith("ollama_")}
    assert {name for name in names - in_backends if not re.search(rf"\.{name}\b", code)} == set()


def targets() -> list[str]:
    return re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE)


@pytest.mark.parametrize("target", targets())
def test_the_page_of_commands_has_every_target(target: str) -> None:
    assert f"| `make {target}" in page("docs/reference/commands.md")


def all_code() -> Iterator[tuple[str, str]]:
    return ((name, text) for name, content in PAGES.items() for text in code(content))


def test_every_target_that_a_page_names_exists() -> None:
    named = {(name, target) for name, text in all_code() for target in re.findall(r"\bmake ([a-z-]+)", text)}
    assert {(name, target) for name, target in named if target not in targets()} == set()


def verbs() -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in main.parser()._actions if isinstance(action, argparse._SubParsersAction))
    return {name: verb for name, verb in found.choices.items() if name not in ("worker", "demo")}


@pytest.mark.parametrize("verb", verbs())
def test_the_page_of_commands_has_every_verb(verb: str) -> None:
    assert f"`{verb}`" in section("docs/reference/commands.md", "Without make")


@pytest.mark.parametrize("verb", verbs())
def test_help_of_every_verb_has_its_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main([verb, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for action in verbs()[verb]._actions:
        assert action.help and all(option in printed for option in action.option_strings)


def test_help_lists_every_verb() -> None:
    done = subprocess.run([sys.executable, "-m", "gateway", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(re.search(rf"^    {verb}\s", done.stdout, re.MULTILINE) for verb in verbs())


def test_make_key_passes_on_every_option_of_the_verb() -> None:
    line = next(line for line in MAKEFILE.splitlines() if "$(GATEWAY) key " in line)
    line = line.replace("$(LIMITS)", next(line for line in MAKEFILE.splitlines() if line.startswith("LIMITS = ")))
    options = {option for action in verbs()["key"]._actions for option in action.option_strings if option.startswith("--")}
    passed = {f"--{name}" for name in re.findall(r"call \w+,\w+,([\w-]+)\)", line)}
    assert passed | {"--json", "--help"} == options


def test_no_command_takes_a_secret_where_ps_shows_it() -> None:
    secret = re.compile(r"nz_|(TOKEN|PASSWORD|SECRET|ADMIN_KEY)=")
    lines = [line for _, text in all_code() for line in text.splitlines()]
    lines += [f"make {words}" for words in re.findall(r"^[a-z-]+:.*## (.*)$", MAKEFILE, re.MULTILINE)]
    shown = [line for line in lines if re.search(r"\bmake \S|python -m gateway ", line)]
    assert len(shown) > 40 and [line for line in shown if secret.search(line.partition("make ")[2])] == []
    options = {option for verb in verbs().values() for action in verb._actions for option in action.option_strings}
    assert [option for option in options if re.search("token|password|secret|admin-key", option)] == []


def test_ci_runs_the_test_command_of_the_readme() -> None:
    commands = documents.blocks(section("README.md", "Development"), "sh")[0].splitlines()
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-len(commands) :] == commands


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("name", PAGES)
def test_links_have_targets(name: str) -> None:
    for link in links(PAGES[name]):
        if re.match(r"https?://|mailto:", link):
            continue
        target, _, anchor = link.partition("#")
        file = documents.relative(name, target) if target else ROOT / name
        assert file.exists(), f"{name} links to {link}: there is no such file"
        if anchor:
            assert anchor in documents.anchors(file.read_text(encoding="utf-8")), f"{name} links to {link}: no such heading"


def test_every_page_is_linked_from_another() -> None:
    linked = {
        documents.relative(name, link.partition("#")[0]).resolve() for name, text in PAGES.items() for link in links(text)
    }
    unlinked = [name for name in PAGES if name.startswith("docs/") and (ROOT / name).resolve() not in linked]
    assert unlinked == [], "link it from README.md or another page"


def test_the_contents_of_the_readme_list_every_section() -> None:
    sections = re.findall(r"^## (.+)$", README, re.MULTILINE)
    assert re.findall(r"\[([^]]+)\]\(#", README.partition("\n## ")[0]) == sections


def test_files_that_the_pages_name_exist() -> None:
    file = re.compile(r"[\w.-]+/[\w./-]*\.[a-z]+|[\w-]+\.(py|yaml|cfg|toml)|(gateway|tests|sql|docs)/[\w/.-]*")
    named = [(name, text) for name, text in all_code() if file.fullmatch(text)]
    assert len(named) > 20
    assert [(name, text) for name, text in named if not documents.exists(text)] == []


ARCHITECTURE = "docs/architecture.md"


def tree_of_the_page() -> set[str]:
    """The files that the tree of architecture.md names, by their paths; each has a word on what it is."""
    (block,) = documents.blocks(section(ARCHITECTURE, "The tree"), "text")
    found: set[str] = set()
    folders: list[str] = []
    for line in block.splitlines():
        match = re.fullmatch(r"((?:  )*)([\w.-]+/?)(?:  +(\S.*))?", line)
        assert match, f"{ARCHITECTURE}: this is no line of a tree: {line!r}"
        indent, name, words = match.groups()
        folders = folders[: len(indent) // 2]
        assert words or name == "gateway/", f"{ARCHITECTURE}: say in a few words what {name} is"
        if name.endswith("/"):
            folders.append(name)
        else:
            found.add("".join(folders) + name)
    return found


def test_the_tree_of_the_architecture_is_the_tree() -> None:
    real = {str(path.relative_to(ROOT)) for path in (ROOT / "gateway").rglob("*.py") if path.name != "__init__.py"}
    named = tree_of_the_page()
    wrong = [f"add a line for {name} to {ARCHITECTURE}" for name in sorted(real - named)]
    wrong += [f"remove the line of {name} from {ARCHITECTURE}" for name in sorted(named - real)]
    assert not wrong, "\n".join(wrong)


def test_the_packages_of_the_architecture_are_those_of_the_order() -> None:
    rows = documents.tables(section(ARCHITECTURE, "Packages"))
    listed = [set(re.findall(r"`([\w.]+)`", packages)) for packages, _ in rows]
    assert listed == [set(floor.split()) for floor in test_architecture.ORDER.split("|")], (
        f"{ARCHITECTURE} has the order of test_architecture.py"
    )


def test_what_the_architecture_names_is_in_the_code() -> None:
    """Classes, and methods as Class.method."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "gateway").rglob("*.py"))
    for text in documents.spans(page(ARCHITECTURE)):
        if match := re.fullmatch(r"([A-Z][a-z]\w+)(?:\.(\w+))?", text):
            kind, method = match.groups()
            if kind == "Makefile":
                continue
            [body] = re.findall(rf"^class {kind}\b.*?(?=^\S|\Z)", source, re.MULTILINE | re.DOTALL) or [""]
            assert body, f"{ARCHITECTURE} names {kind}: there is no such class"
            assert not method or re.search(rf"def {method}\b|^    {method}: ", body, re.MULTILINE), (
                f"{ARCHITECTURE} names {text}: gone"
            )


def error_classes(of: type[GatewayError] = GatewayError) -> Iterator[type[GatewayError]]:
    yield of
    for kind in of.__subclasses__():
        yield from error_classes(kind)


def test_the_page_of_errors_has_every_error_with_its_status() -> None:
    rows = re.findall(r"^\| (\d\d\d|[45]xx) \| (.+?) \|", page("docs/reference/errors.md"), re.MULTILINE)
    listed = {(code, status) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    ours = [kind for kind in error_classes() if kind.__module__ == errors.__name__]
    # The status of a refusal is the backend's, if the caller may know it.
    of_backends: dict[type[GatewayError], tuple[str, ...]] = {
        errors.BackendRefused: ("4xx",),
        errors.PromptTooLong: ("4xx",),
        errors.BackendCannot: ("400", "5xx"),
    }
    real = {(kind.code, status) for kind in ours for status in of_backends.get(kind, (str(kind.status),))}
    assert listed == real


def test_the_page_of_logs_has_every_field() -> None:
    text = page("docs/reference/logs.md")
    assert [field for field in Record("id", "id", "GET").row() if f"`{field}`" not in text] == []


def test_the_page_of_models_has_every_admin_route() -> None:
    text = section("docs/models.md", "Manage models on a backend")
    assert [path for _, path in endpoints.PASSED_THROUGH if path not in text] == []


def test_the_top_folder_holds_only_listed_files() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


# Names that stand in the documents


def sources() -> str:
    """All text in which a name of ours must be found."""
    kinds = ("*.py", "*.sql", "*.lua", "*.json", "*.js", "*.html")
    paths = [path for folder in ("gateway", "sql") for kind in kinds for path in (ROOT / folder).rglob(kind)]
    paths += [ROOT / name for name in ("Makefile", "compose.yaml", "Dockerfile", "setup.cfg", ".env.example")]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def names(pattern: str) -> set[tuple[str, str]]:
    """What matches in the code of all pages, with the page; without addresses of elsewhere."""
    return {(name, found) for name, text in all_code() for found in re.findall(pattern, re.sub(r"https?://\S+", "", text))}


def test_names_in_capitals_are_settings_or_known_variables() -> None:
    known = set(defaults()) | {f"{found.name.upper()}_FILE" for found in settings.declarations() if found.metadata["secret"]}
    known |= set(re.findall(r"\(call \w+,([A-Z_]+),", MAKEFILE)) | OF_OTHERS
    constants = set(re.findall(r"^([A-Z][A-Z0-9_]+)\b.*[=:]", sources(), re.MULTILINE))
    unknown = {(name, found) for name, found in names(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b") if found not in known}
    assert {(name, found) for name, found in unknown if found not in constants or name not in OF_THE_CODE} == set()


def test_names_with_an_underscore_are_in_the_sources() -> None:
    words = set(re.findall(r"\w+", sources()))
    wrong = {
        (name, found) for name, found in names(r"(?<![\w-])(?!gateway_)[a-z][a-z0-9]*(?:_[a-z0-9]+)+\b") if found not in words
    }
    assert {(name, found) for name, found in wrong if found not in OF_OTHERS and not is_of_tests(found)} == set()


def is_of_tests(name: str) -> bool:
    return any((ROOT / "tests").rglob(f"{name}.py"))


def test_metrics_that_the_pages_name_exist() -> None:
    families = {family.name for family in Metrics().families()}
    ends = ("", "_total", "_bucket", "_sum", "_count")
    real = {family + end for family in families for end in ends}
    assert {(name, found) for name, found in names(r"(?<![\w-])gateway_[a-z_]+\b") if found not in real} == set()


def test_every_code_beside_a_status_is_an_error_code() -> None:
    codes = {kind.code: str(kind.status) for kind in error_classes()}
    for name, text in PAGES.items():
        for status, named in re.findall(r"\b([45]\d\d) `([a-z_]+)`", text):
            assert codes.get(named) == status, f"{name} says {status} {named}"


def test_verbs_that_the_pages_name_exist() -> None:
    called = names(r"python -m gateway ([a-z-]+)")
    assert called and {found for _, found in called} <= verbs().keys()


def options_of_target(target: str) -> set[str]:
    """The variables that a target passes on."""
    [recipe] = re.findall(rf"^{target}:.*\n((?:\t.*\n)*)", MAKEFILE, re.MULTILINE)
    [limits] = re.findall(r"^LIMITS = .*", MAKEFILE, re.MULTILINE)
    recipe = recipe.replace("$(LIMITS)", limits)
    found = re.findall(r"\(call \w+,([A-Z_]+),|\$\(([A-Z]+)_FLAG\)|\$\((TESTS)\)|\$\(if \$\(([A-Z]+)\)", recipe)
    return {name for names_of_one in found for name in names_of_one if name}


def test_targets_take_the_variables_that_the_pages_give_them() -> None:
    given = {
        (name, target, variable)
        for name, text in all_code()
        for target, rest in re.findall(r"\bmake ([a-z-]+)((?: [A-Z_]+=(?:\"[^\"]*\"|\S*))+)", text)
        for variable in re.findall(r"([A-Z_]+)=", re.sub(r'"[^"]*"', "", rest))
    }
    assert len(given) > 15
    assert {(name, target, variable) for name, target, variable in given if variable not in options_of_target(target)} == set()


def test_the_page_of_commands_has_every_option_of_key() -> None:
    listed = set(re.findall(r"\b([A-Z_]+)=", section("docs/reference/commands.md", "Keys")))
    assert options_of_target("key") - listed == {"JSON"}


# The rest of the repository


def test_the_changelog_has_the_version() -> None:
    [version] = re.findall(r"^version = (\S+)$", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.search(rf"^## {re.escape(version)} - ", page("docs/CHANGELOG.md"), re.MULTILINE)


def test_the_package_description_is_the_readmes() -> None:
    assert "long_description = file: README.md" in (ROOT / "setup.cfg").read_text(encoding="utf-8")


def test_ci_and_the_script_run_the_same_checks() -> None:
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = [step for job in flow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert all(re.search(r"@[0-9a-f]{40}$", step["uses"]) for step in steps if "uses" in step)


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_issue_forms_ask_for_the_doctors_output(form: str) -> None:
    found = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= found.keys()
    labels = [part["attributes"]["label"] for part in found["body"] if part["type"] != "markdown"]
    assert "Output of `make doctor`" in labels and len(labels) == len(set(labels))


def test_style_bounds_of_contributing_are_those_of_the_test() -> None:
    words = page(".github/CONTRIBUTING.md")
    assert f"at most {test_architecture.LONGEST_FUNCTION} lines" in words
    assert f"modules have at most {test_architecture.LONGEST_MODULE}" in words
