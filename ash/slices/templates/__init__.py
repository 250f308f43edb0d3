"""Chat templates that Ash ships, for models whose file has none that serves."""

from __future__ import annotations

from importlib.resources import files

from ash.domain.errors import ConfigError


def template_source(template: str) -> str:
    """The jinja2 source that a slice's `template` setting means.

    A text with `{` in it is a template; anything else names one of this package, such as `completion`.

    Raises:
        ConfigError: there is no template of that name.
    """
    if "{" in template:
        return template
    resource = files(__name__) / f"{template}.jinja"
    if not template.isidentifier() or not resource.is_file():
        names = sorted(
            entry.name.removesuffix(".jinja")
            for entry in files(__name__).iterdir()
            if entry.name.endswith(".jinja")
        )
        raise ConfigError(
            f"template = {template!r}: there is no such template; write one of {', '.join(names)}, "
            "or the text of a jinja2 template"
        )
    return resource.read_text(encoding="utf-8")
