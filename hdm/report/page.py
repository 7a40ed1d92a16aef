"""The page: one HTML file that asks nothing of any network, and the same content as Markdown."""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hdm.report import sections, words
from hdm.report.analysis import Analysis
from hdm.report.figures import Drawing
from hdm.report.gallery import MOST_SETTINGS, Gallery
from hdm.report.style import CSS
from hdm.report.tables import Table

_LONG = 40  # rows from which a table is folded away
_PACKAGES = ("torch", "transformers", "diffusers", "torch-fidelity", "numpy", "scipy", "optuna", "mlflow", "hdm-lab")


@dataclass(kw_only=True, slots=True)
class Report:
    """Everything that goes onto the page. `environment` is the environment.json of one run, or {}."""

    analysis: Analysis
    drawings: Sequence[Drawing]
    galleries: Sequence[Gallery]
    environment: Mapping[str, Any]

    @property
    def title(self) -> str:
        """What was compared."""
        axes = ", ".join(self.analysis.record.axes) or "one setting"
        return f"{self.analysis.metric} by {axes}"

    def html(self) -> str:
        """The page."""
        a = self.analysis
        parts = [
            f"<h1>{html.escape(self.title)}</h1>",
            f"<p class=sub>Sweep {html.escape(a.record.name)}: {self._extent()}</p>",
            f"<div class=claim>{_paragraphs(words.headline(a))}</div>",
            _paragraphs([words.budget(a), words.planning(a), words.noise(a)]),
            _warnings(words.warnings(a)),
            self._results(),
            *(self._figure(name) for name in ("curves", "pareto")),
            self._pictures(),
            *(_section(table) for table in (sections.other_metrics(a), sections.importance(a), sections.cost(a)) if table),
            self._what_was_run(),
        ]
        head = (
            f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<link rel="icon" href="data:,"><title>{html.escape(self.title)}</title><style>{CSS}</style>'
        )
        body = "\n".join(part for part in parts if part)
        return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n'

    def markdown(self) -> str:
        """The same without pictures of the arms: sentences, figures and tables."""
        a = self.analysis
        lines = [f"# {self.title}", f"Sweep {a.record.name}: {self._extent()}", *words.headline(a)]
        lines += [line for line in (words.budget(a), words.planning(a), words.noise(a)) if line]
        lines += ["\n".join(f"- {line}" for line in words.warnings(a))]
        lines += [f"![{drawing.title}](figures/{drawing.name}.png)\n\n{drawing.caption}" for drawing in self.drawings]
        for table in sections.tables(a):
            lines += [f"## {table.title}", table.markdown().rstrip()]
        lines += ["## Made with", "\n".join(f"- {line}" for line in self._made_with())]
        return "\n\n".join(line for line in lines if line) + "\n"

    def latex(self) -> str:
        """Every table, for \\input."""
        return "% needs \\usepackage{booktabs} and \\usepackage[T1]{fontenc}\n" + "\n".join(
            t.latex() for t in sections.tables(self.analysis)
        )

    # --- parts

    def _extent(self) -> str:
        a = self.analysis
        arms = a.record.arms
        finished, count, seeds = sum(arm.finished for arm in arms), len(a.settings), len(a.seeds)
        kind = (
            "" if a.record.confirmatory else f", a search ({a.record.sampler}{f', {a.record.pruner}' if a.record.pruner else ''})"
        )
        return (
            f"{count} setting{'s' * (count != 1)}, {seeds} seed{'s' * (seeds != 1)}, {len(arms)} arm{'s' * (len(arms) != 1)},"
            f" {finished} finished{kind}."
        )

    def _results(self) -> str:
        a = self.analysis
        seeds = _folded(sections.every_seed(a), "Every seed", always=len(a.settings) > _LONG)
        return (
            f"<h2>Results</h2>{self._figure('differences')}{_folded(sections.results(a), 'All settings')}"
            f"<p class=note>{html.escape(words.method(a))}</p>{seeds}"
        )

    def _figure(self, name: str) -> str:
        drawing = next((d for d in self.drawings if d.name == name), None)
        if drawing is None:
            return ""
        head = "" if name == "differences" else f"<h2>{html.escape(drawing.title)}</h2>"
        caption = f"<figcaption>{html.escape(drawing.caption)}</figcaption>"
        return f'{head}<figure id="figure-{name}">{drawing.inline()}{caption}</figure>'

    def _pictures(self) -> str:
        if not self.galleries:
            return ""
        first, *others = self.galleries
        a = self.analysis
        drawn, count = len(a.shown(MOST_SETTINGS)), len([s for s in a.settings if s.finite(a.metric)])
        left = f" {drawn} of {count} settings: the baseline and the best." if count > drawn else ""
        text = f"Rows are held-out captions, columns are settings; all start from the same noise. Seed {first.seed}.{left}"
        more = "".join(f"<details><summary>Seed {g.seed}</summary>{g.html()}</details>" for g in others)
        missing = len(a.seeds) - len(self.galleries)
        note = f"<p class=note>The pictures of {missing} more seeds are in MLflow.</p>" if missing else ""
        return f'<h2>Pictures</h2><p class=note>{html.escape(text)}</p><div id="pictures">{first.html()}</div>{more}{note}'

    def _what_was_run(self) -> str:
        a = self.analysis
        command = f"<pre><code>{html.escape(a.record.command)}</code></pre>" if a.record.command else ""
        differing = sections.configuration(a)
        table = _folded(differing, "What differed") if differing else ""
        return (
            f"<h2>What was run</h2>{command}{table}{_folded(sections.shared(a), 'What all arms share', always=True)}"
            f"{_paragraphs(self._made_with(), css='note')}"
        )

    def _made_with(self) -> list[str]:
        """Code, data, packages and machine."""
        arms = [arm for arm in self.analysis.record.arms if arm.run_id]
        commits = dict.fromkeys(arm.tags.get("mlflow.source.git.commit", "") for arm in arms)
        dirty = any(arm.tags.get("hdm.git.dirty") == "true" for arm in arms)
        known = ", ".join(commit[:12] for commit in commits if commit) or "not recorded"
        lines = [f"Code: commit {known}{', with uncommitted changes' if dirty else ''}."]
        for context, word in (("train", "Training data"), ("validation", "Held-out data")):
            data = dict.fromkeys(arm.datasets[context] for arm in arms if context in arm.datasets)
            lines += [f"{word}: {', '.join(data)}."] if data else []
        packages = self.environment.get("packages", {})
        versions = ", ".join(f"{name} {packages[name]}" for name in _PACKAGES if name in packages)
        python = self.environment.get("python")
        lines += [f"Python {python}, {versions}."] if python else []
        cpu, gpus = self.environment.get("cpu") or {}, self.environment.get("gpus") or []
        machine = ", ".join(filter(None, [*dict.fromkeys(gpus), cpu.get("name", "")]))
        lines += [f"Machine: {machine}, {cpu.get('cores', '?')} cores."] if machine else []
        protocols = {(k.removeprefix("protocol."), v) for arm in arms for k, v in arm.tags.items() if k.startswith("protocol.")}
        lines += [f"Protocols: {', '.join(f'{kind} {digest}' for kind, digest in sorted(protocols))}."] if protocols else []
        return lines


def _paragraphs(lines: Iterable[str], css: str = "") -> str:
    return "".join(f"<p{f' class={css}' if css else ''}>{html.escape(line)}</p>" for line in lines if line)


def _warnings(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return f"<div class=warn><ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul></div>"


def _section(table: Table) -> str:
    return f"<h2>{html.escape(table.title)}</h2>{_folded(table, table.title)}<p class=note>{html.escape(table.caption)}</p>"


def _folded(table: Table, title: str, *, always: bool = False) -> str:
    """A table as it is, or behind its title where it is long."""
    if always or len(table.rows) > _LONG:
        return f"<details><summary>{html.escape(title)} ({len(table.rows)} rows)</summary>{table.html()}</details>"
    return table.html()
