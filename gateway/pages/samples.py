"""Samples of each route's call in curl, Python and JavaScript; each of them runs as it is."""

import json
import shlex
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

BASE = "http://127.0.0.1:8080"


@dataclass(frozen=True)
class Sample:
    """A call: `address` is path and query; `body` is sent as JSON, or as a form if there is a `file`; `raw` as it is.

    `key_in` names the environment's variable with the key; `client` is the method of `package` (openai, anthropic or
    ollama) that makes this call; the answer goes to the file `saves`, if it has a name.
    """

    method: str
    address: str
    key_in: str = ""
    body: Any = None
    raw: str = ""
    streams: bool = False
    client: str = ""
    saves: str = ""
    file: str = ""
    package: str = ""

    @property
    def url(self) -> str:
        return BASE + self.address

    def in_all_languages(self) -> list[dict[str, str]]:
        """In the form of the extension `x-codeSamples`."""
        python = self._with_client() if self.client else self._python()
        return [
            {"lang": "Shell", "label": "curl", "source": self._curl()},
            {"lang": "Python", "label": "Python", "source": python},
            {"lang": "JavaScript", "label": "JavaScript", "source": self._javascript()},
        ]

    def _curl(self) -> str:
        own = "POST" if self._has_body else "GET"
        how = "--head " if self.method == "HEAD" else f"-X {self.method} " if self.method != own else ""
        parts = [f"curl {'-N ' if self.streams else ''}{how}{shlex.quote(self.url)}"]
        if self.key_in:
            parts.append(f'-H "Authorization: Bearer ${self.key_in}"')
        if self.file:
            parts += [f"-F {shlex.quote(f'{name}={value}')}" for name, value in self.body.items()] + [f"-F file=@{self.file}"]
        elif self.body is not None:
            parts += ["-H 'Content-Type: application/json'", f"-d {shlex.quote(json.dumps(self.body))}"]
        if self.raw:
            parts += ["-H 'Content-Type: application/octet-stream'", f"--data-binary {shlex.quote(self.raw)}"]
        if self.saves:
            parts.append(f"-o {self.saves}")
        return " \\\n  ".join(parts)

    def _python(self) -> str:
        arguments = [json.dumps(self.url)]
        if self.key_in:
            arguments.append(f'headers={{"Authorization": f"Bearer {{os.environ[\'{self.key_in}\']}}"}}')
        if self.body is not None:
            arguments.append(f"json={json.dumps(self.body)}")
        if self.raw:
            arguments.append(f"data={json.dumps(self.raw)}")
        arguments += ["stream=True", "timeout=600"] if self.streams else ["timeout=60"]
        listed = "".join(f"    {argument},\n" for argument in arguments)
        shown = (
            "for line in answer.iter_lines():\n    print(line.decode(), flush=True)" if self.streams else "print(answer.text)"
        )
        if self.saves:
            shown = f'with open("{self.saves}", "wb") as file:\n    file.write(answer.content)'
        imports = "import os\n\nimport requests\n" if self.key_in else "import requests\n"
        return f"{imports}\nanswer = requests.{self.method.lower()}(\n{listed})\nanswer.raise_for_status()\n{shown}"

    def _with_client(self) -> str:
        """With the official package."""
        arguments = ", ".join(f"{name}={json.dumps(value)}" for name, value in (self.body or {}).items())
        arguments += f', file=open("{self.file}", "rb")' if self.file else ""
        arguments = arguments or (json.dumps(self.address.rpartition("/")[2]) if self.client.endswith(".retrieve") else "")
        if self.package == "openai":
            made = f'from openai import OpenAI\n\nclient = OpenAI(base_url="{BASE}/v1", api_key=os.environ["{self.key_in}"])'
        elif self.package == "anthropic":
            made = "from anthropic import Anthropic\n\n"
            made += f'client = Anthropic(base_url="{BASE}", auth_token=os.environ["{self.key_in}"])'
        else:
            bearer = f"f\"Bearer {{os.environ['{self.key_in}']}}\""
            made = f'from ollama import Client\n\nclient = Client("{BASE}", headers={{"Authorization": {bearer}}})'
        return f"import os\n\n{made}\nanswer = client.{self.client}({arguments})\nprint(answer.model_dump_json(indent=2))"

    def _javascript(self) -> str:
        kind = "application/octet-stream" if self.raw else "application/json"
        headers = [f"Authorization: `Bearer ${{process.env.{self.key_in}}}`"] if self.key_in else []
        headers += [f'"Content-Type": "{kind}"'] if self._has_body and not self.file else []
        options = [f'method: "{self.method}"'] if self.method != "GET" else []
        options += [f"headers: {{ {', '.join(headers)} }}"] if headers else []
        if self.file:
            options.append("body: form")
        elif self._has_body:
            options.append(f"body: {json.dumps(self.raw) if self.raw else f'JSON.stringify({json.dumps(self.body)})'}")
        listed = "".join(f"  {option},\n" for option in options)
        second = f", {{\n{listed}}}" if listed else ""
        call = f"const answer = await fetch({json.dumps(self.url)}{second});"
        shown = "for await (const piece of answer.body) process.stdout.write(piece);"
        shown = shown if self.streams else "console.log(await answer.text());"
        if self.saves:
            shown = f'await writeFile("{self.saves}", Buffer.from(await answer.arrayBuffer()));'
            call = f'import {{ writeFile }} from "node:fs/promises";\n\n{call}'
        if self.file:
            call = f"{self._javascript_form()}\n{call}"
        return f"{call}\nif (!answer.ok) throw new Error(`${{answer.status}} ${{await answer.text()}}`);\n{shown}"

    def _javascript_form(self) -> str:
        lines = ['import { readFile } from "node:fs/promises";', "", "const form = new FormData();"]
        lines += [f"form.append({json.dumps(name)}, {json.dumps(value)});" for name, value in self.body.items()]
        lines.append(f'form.append("file", new Blob([await readFile("{self.file}")]), "{self.file}");')
        return "\n".join(lines)

    @property
    def _has_body(self) -> bool:
        return self.body is not None or bool(self.raw)


def address(path: str, in_path: dict[str, str], query: dict[str, Any]) -> str:
    """`path` with its variables filled in, and the query."""
    filled = path.format(**in_path)
    return f"{filled}?{urlencode(query)}" if query else filled
