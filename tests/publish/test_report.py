"""What `crdiff publish` shows: what is planned before, the report after, for people, machines and a CI job's page."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from crdiff_export.errors import HubError
from crdiff_export.export import ExportRequest
from crdiff_export.publish.commit import PushResult
from crdiff_export.publish.plan_file import PlanEntry, PlanFile
from crdiff_export.publish.report import in_order, markdown
from crdiff_export.publish.run import Outcome, TagResult
from crdiff_export.publish.worklist import BaseWork, PublishRequest, WorkItem, Worklist
from crdiff_export.sizes import Size
from tests.support.isolation import Crdiff
from tests.support.loopback_hub import READ_TOKEN
from tests.support.publishing import BASE, Desk, plan

VARIANT = {
    "base", "size", "repo", "revision", "path", "output", "family", "ratios", "poa_weight", "provenance", "digest",
    "borrowed_from", "line", "notes", "error", "criterion", "calibration",
}  # fmt: skip


# --- before ---

MIXED = f"""
[[base]]
base = "{BASE}"
repo = "tester/out"
sizes = ["48x48", "80x80", "72x72"]
name = "{{size}}.safetensors"

[[base.variant]]
size = "96x96"
ratios = {{ down = 0.1, mid = 0, up = 0.25 }}
name = "96x96.safetensors"

[[base.variant]]
size = "96x64"
name = "foreign.safetensors"

[[base]]
base = "org/nothing"
repo = "tester/out"
sizes = ["96x64"]
name = "nothing.safetensors"
"""
WHY = ["unchanged", "made by an earlier run", "new", "changed: poa.weight, ratio.down, ratio.mid, …",
       "replaces what crdiff did not make", "org/nothing: no such repository, or a private one"]  # fmt: skip


def test_a_dry_run_says_what_would_be_done_and_does_nothing(desk: Desk) -> None:
    desk.base()
    desk.plan(plan("48x48", "96x96", "80x80"))
    assert desk.publish("-o", "out").code == 0
    desk.hub.commit("tester/out", {"80x80.safetensors": None, "foreign.safetensors": b"\0" * 600})
    desk.plan(MIXED)
    there, files = desk.hub.repo("tester/out").refs, desk.files()
    page = desk.tmp / "page.md"
    more = ("-o", "out", "--keep", "none")
    ran = desk.publish("--dry-run", *more, token=READ_TOKEN, env={"GITHUB_STEP_SUMMARY": str(page)})
    assert ran.code == 4
    head, *rows, _, variants, fetch, write = ran.out.splitlines()
    assert head.split() == ["base", "size", "ratios", "goes", "to", "what", "why"]
    assert [next(why for why in WHY if row.endswith(why)) for row in rows] == WHY
    words = ["nothing", "push", "make and push", "make and push", "make and push", "cannot"]
    assert [word for word, row, why in zip(words, rows, WHY, strict=True) if f"  {word}  " not in row] == []
    assert "  0.1/0/0.25 (starting point)  " in rows[3]
    assert "(borrowed from 80x80)" in rows[2]
    assert variants == "variants: 3 to make, 1 to push, 1 there, 1 failing"
    assert fetch == "to fetch: at most 193.25 KB"
    assert write == "to write: 470.14 KB, 156.71 KB at once"
    note, error, hint = ran.err.splitlines()
    borrowed = "no variant for 72x72; its numbers are borrowed from 80x80, a starting point"
    assert note == f"note: 72x72 of model.safetensors: {borrowed}"
    assert error == "crdiff: 96x64 of nothing: org/nothing: no such repository, or a private one"
    assert hint.startswith("  Check the id")
    assert not page.exists()

    desk.plan(plan("512"), "far.toml")
    ran = desk.publish("far.toml", "--dry-run", token=READ_TOKEN)
    assert ran.err.startswith("warning: 512x512 of model.safetensors: no variant for 512x512")

    ran = desk.publish("--dry-run", "-o", "out", "--json", token=READ_TOKEN, env={"GITHUB_STEP_SUMMARY": str(page)})
    assert (ran.code, ran.err) == (4, "")
    assert ran.result.keys() == {"schema", "dry_run", "variants", "packs"}
    assert (ran.result["schema"], ran.result["dry_run"]) == (1, True)
    found = ran.result["variants"]
    assert [one.keys() for one in found] == [VARIANT | {"action", "reason"}] * 6
    assert [one["reason"] for one in found] == WHY
    assert [one["action"] for one in found] == ["skip", "send", "make", "make", "make", "fail"]
    assert found[2] == {
        "base": BASE, "size": "72x72", "repo": "tester/out", "revision": "main", "path": "72x72.safetensors",
        "output": "out/72x72.safetensors", "family": "demo", "ratios": {"down": 0.036, "mid": 0.4942, "up": 0.1461},
        "poa_weight": 1.2519, "provenance": "starting-point", "borrowed_from": "80x80", "digest": None, "line": 5,
        "action": "make",
        "criterion": "magnitude", "calibration": None,
        "reason": "new", "notes": [borrowed], "error": None,
    }  # fmt: skip
    assert found[5]["error"]["code"] == "hub"

    quiet = desk.publish("--dry-run", "-o", "out", "-q", token=READ_TOKEN)
    assert quiet.code == 4
    assert quiet.out.splitlines() == [head, *rows]
    assert quiet.err.splitlines() == [error, hint]
    assert all(asked.method == "GET" for asked in desk.hub.requests)
    assert desk.downloads() == []
    assert (desk.hub.repo("tester/out").refs, desk.files()) == (there, files)


def test_a_dry_run_without_a_push_leaves_the_hub_out(crdiff: Crdiff, here: Path) -> None:
    (here / "plan.toml").write_text(plan("48x48", "96x64", base="demo"))
    ran = crdiff("publish", "plan.toml", "--dry-run", "--no-push", "-o", "out", "-q")
    assert ran.code == 0
    assert [row.split()[-3:] for row in ran.out.splitlines()[1:]] == [
        ["out/48x48.safetensors", "make", "new"], ["out/96x64.safetensors", "make", "new"]
    ]  # fmt: skip
    assert [path.name for path in here.iterdir()] == ["plan.toml"]


# --- after ---


def test_a_run_says_what_it_did(desk: Desk) -> None:
    desk.base()
    text = MIXED.replace('"tester/out"', '"tester/out"\ntag = "v1_0"', 1)
    desk.plan(text)
    page = desk.tmp / "page.md"
    page.write_text("Before.\n")
    how: dict[str, Any] = {"env": {"GITHUB_STEP_SUMMARY": str(page)}}
    ran = desk.publish("--json", **how)
    assert (ran.code, ran.err) == (4, "")
    assert ran.result.keys() == {"schema", "variants", "packs", "tags", "published", "written", "unchanged", "failed"}
    assert [ran.result[status] for status in ("published", "written", "unchanged", "failed")] == [5, 0, 0, 1]
    found = ran.result["variants"]
    more = {"status", "bytes", "sha256", "commit", "url", "pull_request"}
    assert [one.keys() for one in found] == [VARIANT | more] * 6
    one = found[2]
    data = desk.hub.read("tester/out", "72x72.safetensors")
    assert one["url"] == f"{desk.hub.url}/tester/out/resolve/{one['commit']}/72x72.safetensors"
    assert (one["bytes"], one["sha256"]) == (len(data), sha256(data).hexdigest())
    assert one["notes"] == ["no variant for 72x72; its numbers are borrowed from 80x80, a starting point"]
    assert found[0]["notes"] == ["created tester/out, private, as the licence of its base is not known"]
    assert len({one["digest"] for one in found}) == 6
    assert [tag.keys() for tag in ran.result["tags"]] == [{"repo", "tag", "commit", "error"}]
    before, table = page.read_text().split("\n", 1)
    assert before == "Before."
    header, *rows, last = cells(table)
    assert header == ["base", "size", "result", "bytes", "commit", "where"]
    assert rows[2] == [BASE, "72x72", "✅ published", "197.67 KB", one["commit"][:10], "tester/out/72x72.safetensors"]
    assert last[2] == "❌ failed: org/nothing: no such repository, or a private one"
    assert f"]({one['url']}) |" in table

    ran = desk.publish(**how)
    assert ran.code == 4
    _, *lines, tagged = ran.out.splitlines()
    assert [line.split()[2] for line in lines] == ["unchanged"] * 5 + ["failed"]
    assert tagged == f"tag v1_0 of tester/out: {found[4]['commit'][:10]}"
    assert [line.partition(":")[0] for line in ran.err.splitlines()] == [
        "crdiff",
        "  Check the id, or run `hf auth login` or set HF_TOKEN.",
    ]
    assert page.read_text().startswith("Before.\n" + table)
    assert "Tag v1\\_0 of tester/out: " in page.read_text()

    desk.plan(text.partition('[[base]]\nbase = "org/nothing"')[0].replace("48x48", "64x96"))
    ran = desk.publish("-q", "--keep", "none", env={"FORCE_COLOR": "1"})
    assert ran.code == 4  # the tag is elsewhere
    first, *others = ran.out.splitlines()
    assert (
        first == f"{desk.hub.url}/tester/out/resolve/{desk.hub.repo('tester/out').branches['main']}/64x96.safetensors"
    )
    assert others == [f"tester/out/{one['path']}" for one in found[1:5]]
    assert ran.err.startswith("\x1b[1;31mcrdiff: tester/out: the tag v1_0 is at ")
    ran = desk.publish("-q", env={"FORCE_COLOR": "1", "NO_COLOR": "1"})
    assert ran.err.startswith("crdiff: tester/out: the tag v1_0 is at ")


def cells(page: str) -> list[list[str]]:
    """The cells of the table on a page, as a reader of GitHub's Markdown sees them."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(page)
    rows: list[list[str]] = []
    for number, token in enumerate(tokens):
        if token.type == "tr_open":
            rows.append([])
        if token.type in ("th_open", "td_open"):
            rows[-1].append(shown(tokens[number + 1]))
    return rows


def shown(token: Any) -> str:
    """The text of a cell, and the name of anything that is more than text or a link."""
    plain = ("text", "text_special", "link_open", "link_close")
    return "".join(c.content if c.type in plain else f"({c.type})" for c in token.children)


# --- a CI job's page ---

HOSTILE = {
    "a table": "a | b \\| c \\",
    "html": "<script>alert(1)</script> <!-- no --> &lt; &amp;amp;",
    "markdown": "**a** _b_ `c` ~~d~~ [e](http://f) ![g](h) <http://i> \\_j\\_ #k",
    "backticks": "``a` ```b",
    "formula": "$a$ $$b$$ \\(c\\)",
    "spaces": "a  b",
    "accents": "déjà 模型 🎨",
}
CONTROL = {"a new line": "a\nb", "an escape": "a\x1b[31mb", "a direction": "a\u202eb", "half a pair": "a\ud800b"}


def reported(text: str, **changes: Any) -> list[list[str]]:
    """The table on the page about one variant whose base, place and error read so."""
    item = made(text)
    failed = Outcome(item, "failed", error=HubError(f"{text} x", "A hint."))
    found = worklist_of(item, name=text)
    tags = [TagResult(text, text, error=HubError(text, "")), TagResult("o/n", "v", "c" * 40)]
    page = markdown(found, [replace(failed, **changes)], tags)
    headline, *_ = page.splitlines()
    assert headline.startswith("### crdiff publish ")
    return cells(page)


def made(text: str, size: int = 64) -> WorkItem:
    request = ExportRequest(text, Size(size, size), Path(text))
    return WorkItem(PlanEntry(request, text, repo="o/n"), request, text)


def worklist_of(*items: WorkItem, name: str = "plan.toml") -> Worklist:
    plan = PlanFile(name, tuple(item.entry for item in items))
    return Worklist(PublishRequest(Path("plan.toml"), Path()), plan, (BaseWork(None, items),))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_page_shows_names_as_they_are(name: str) -> None:
    text = HOSTILE[name]
    _, row = reported(text)
    assert row == [text, "64x64", f"❌ failed: {text} x", "-", "-", f"o/n/{text}"]
    pushed = PushResult("o/n", "main", "c" * 40, changed=True, page="https://hub/o/n", urls={text: "https://hub/f"})
    _, row = reported(text, status="published", error=None, pushed=pushed, size=1500)
    assert row == [text, "64x64", "✅ published", "1.50 KB", "c" * 10, f"o/n/{text}"]


@pytest.mark.parametrize("name", CONTROL)
def test_a_page_has_no_control_characters(name: str) -> None:
    text = CONTROL[name]
    _, row = reported(text)
    assert row[0] == ascii(text)[1:-1]
    assert all(cell.isprintable() for cell in row)


def test_a_page_lists_what_was_not_reached_in_the_plans_order() -> None:
    items = [made(f"{size}.safetensors", size) for size in (1, 2, 3, 4)]
    found = worklist_of(*items)
    outcomes = in_order(found, [Outcome(items[2], "published"), Outcome(items[0].fail(HubError("no", "")), "failed")])
    assert [outcome.item.request.size.width for outcome in outcomes] == [1, 3]
    _, *rows = cells(markdown(found, outcomes, [TagResult("o/n", "v1", "c" * 40)]))
    assert [(row[1], row[2]) for row in rows] == [
        ("1x1", "❌ failed"), ("3x3", "✅ published"), ("2x2", "⏹ not reached"), ("4x4", "⏹ not reached")
    ]  # fmt: skip


def test_a_page_does_not_name_this_machines_folders(tmp_path: Path) -> None:
    item = made(str(tmp_path / "base.safetensors"))
    _, row = cells(markdown(worklist_of(item), [], []))
    assert row[0] == "base.safetensors"


# --- a plan that is wrong ---

BAD = """\
repo = "no repository"
sizes = ["512", "12y"]
keep = true

[[base]]
base = "sdxl"
ratios = { down = 2 }
"""


def test_all_that_is_wrong_with_a_plan_is_said_at_once(desk: Desk) -> None:
    desk.plan(BAD)
    ran = desk.publish("--json", env={"GITHUB_STEP_SUMMARY": str(desk.tmp / "page.md")})
    assert (ran.code, ran.out, desk.hub.requests) == (1, "", [])
    assert ran.error.keys() == {"code", "message", "hint", "problems"}
    assert (ran.error["code"], ran.error["message"]) == ("plan-file", "plan.toml: 4 problems")
    lines = [problem["message"].split(" ", 1)[0] for problem in ran.error["problems"]]
    assert lines == ["plan.toml:1:", "plan.toml:2:", "plan.toml:3:", "plan.toml:7:"]
    assert all(problem["hint"] for problem in ran.error["problems"])
    said = [
        text for problem in ran.error["problems"] for text in (f"crdiff: {problem['message']}", f"  {problem['hint']}")
    ]
    ran = desk.publish("--dry-run", "-o", "out")
    assert (ran.code, ran.out, desk.hub.requests) == (1, "", [])
    assert ran.err.splitlines()[:-2] == said
    assert desk.files() == set()
