"""A call whose body is a form: the same checks as for JSON, on fields that are all texts."""

from gateway.core import strict_json
from gateway.core.errors import BadRequest
from gateway.dialects.dialect import Call, Dialect, Operation, Upload
from gateway.dialects.model_names import NAME_RULE, canonical, is_name
from gateway.dialects.multipart import Form
from gateway.dialects.refused_fields import CHECKED_IN_EXTRAS, refuse_fields

# Fields that backends read as numbers or objects; of answers there is one.
COUNTS = ("n", "n_cmpl", "best_of")
OBJECTS = ("stream_options",)


def read_form_call(dialect: Dialect, operation: Operation, form: Form, upload: Upload) -> Call:
    fields: dict[str, object] = {**dict.fromkeys(form.files, "(a file)"), **form.texts}
    strict_json.refuse_case_variants(fields, dialect.known_fields)
    _refuse_bracketed(form)
    refuse_fields(fields)
    asked = _model_of(form)
    for name in COUNTS:
        if fields.get(name, "1") != "1":
            raise BadRequest(f"the field {name!r} must be 1")
    for name in OBJECTS:
        if name in fields:
            raise BadRequest(f"the field {name!r} is not allowed in a form")
    operation.check(fields)
    return Call(operation, asked, canonical(asked), _is_stream(fields), dict(form.texts), upload=upload)


def _model_of(form: Form) -> str:
    if "model" in form.files:
        raise BadRequest("the field 'model' must be a text, not a file")
    asked = form.texts.get("model", "")
    if not asked:
        raise BadRequest("the field 'model' is missing")
    if not is_name(asked):
        raise BadRequest(f"the field 'model' {NAME_RULE}")
    return asked


def _refuse_bracketed(form: Form) -> None:
    """Some servers read `model[]` or `model[0]` as the field `model`."""
    for name in (*form.texts, *form.files):
        own, bracket, _ = name.partition("[")
        if bracket and own.casefold() in CHECKED_IN_EXTRAS:
            raise BadRequest(f"the field {name!r} is not allowed")


def _is_stream(fields: dict[str, object]) -> bool:
    stream = str(fields.get("stream", "false")).lower()
    if stream not in ("true", "false"):
        raise BadRequest("the field 'stream' must be true or false")
    return stream == "true"
