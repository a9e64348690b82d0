"""One self-contained page of HTML: nothing is fetched, and it prints in black on white."""

import html
from collections.abc import Sequence


def html_page(title: str, body: str, style: str = "") -> str:
    """The whole page.

    Args:
        title: its title and heading, plain text.
        body: what follows, HTML.
        style: further rules of CSS.
    """
    return _PAGE.format(style=_STYLE + style, title=escape(title), body=body)


def escape(text: object) -> str:
    """Text as HTML shows it."""
    return html.escape(str(text))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways where it is too wide.

    Args:
        header: of the columns, HTML.
        rows: cells, HTML.
    """
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


_STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --soft: #595959; --line: #d0d0d0; --back: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --text: #ececec; --soft: #b0b0b0; --line: #4a4a4a; --back: #161616; }
}
@media print { :root { --text: #000000; --soft: #404040; --line: #b0b0b0; --back: #ffffff; } }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--text); background: var(--back); }
h1 { line-height: 1.2; overflow-wrap: anywhere; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
strong { font-size: 1.5rem; } figcaption, dd { color: var(--soft); }
dt { font-weight: bold; } dd { margin: 0 0 0.5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.75rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; } td { white-space: nowrap; }
figure { margin: 1.5rem 0; break-inside: avoid; }
img { display: block; max-width: 100%; height: auto; margin: auto; background: #ffffff; border-radius: 4px; }
figcaption { max-width: 45rem; margin: 0.5rem auto 0; }
details { margin: 1.5rem 0; } summary { cursor: pointer; } pre { overflow-x: auto; font-size: 0.875rem; }
@media print { .wide, pre { overflow: visible; } pre { white-space: pre-wrap; } table { font-size: 0.75rem; } }
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
