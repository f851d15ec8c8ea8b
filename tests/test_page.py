import html.parser
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from demix_jax.errors import DemixError
from demix_jax.report.page import report
from demix_jax.report.results import STACK
from demix_jax.report.settings import BEST, read_results

DOMAINS = {"law": False, "med": False, "tweets": True}  # novel?
RUN = "runs/a/demix"


def make_row(
    mode: str, domain: str, nats: float, *, run: str = RUN, expert: str | None = None, **more: Any
) -> dict[str, Any]:
    """A row of 1000 tokens of 4 bytes."""
    row = {
        "run": run,
        "variant": "demix",
        "checkpoint": 7,
        "domain": domain,
        "novel": DOMAINS.get(domain, False),
        "split": "test",
        "mode": mode,
        "prior": None,
        "switch_rate": None,
        "top_k": None,
        "expert": expert,
        "tokens": 1000,
        "bytes": 4000,
        "nats": 1000 * nats,
        "posterior": None,
    }
    return row | more


def expert_rows() -> list[dict[str, Any]]:
    nats = {("law", "law"): 3.0, ("law", "med"): 4.0, ("law", "tweets"): 5.0}
    nats |= {("med", "law"): 3.5, ("med", "med"): 3.2, ("med", "tweets"): 4.8}
    return [make_row("known" if e == d else "expert", d, n, expert=e) for (e, d), n in nats.items()]


def dense_rows() -> list[dict[str, Any]]:
    common = {"run": "runs/a/dense", "variant": "dense", "expert": "dense"}
    return [
        make_row("expert" if novel else "known", d, n, **common)
        for (d, novel), n in zip(DOMAINS.items(), (3.1, 3.3, 4.6), strict=True)
    ]


def mixing_rows(mode: str = "uniform", **more: Any) -> list[dict[str, Any]]:
    rows = []
    for rate, shift in ((0.0, 0.0), (0.01, -0.04), (1.0, 0.4)):
        for k in (None, 1):
            for domain, nats in zip(DOMAINS, (3.05, 3.25, 4.7), strict=True):
                value = nats + shift + (0.01 if k else 0)
                row = make_row(mode, domain, value, switch_rate=rate, top_k=k, **more)
                rows.append(row | {"posterior": {"law": 0.7, "med": 0.3}})
    return rows


def write_results(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"rows": rows, "averages": []}))
    return folder


def write_traces(folder: Path, run: str = RUN) -> None:
    weights = np.full((2, 40, 2), 0.5, np.float16)
    weights[1, 30:] = np.nan
    traces = {f"{run}|{domain}": weights for domain in DOMAINS}
    np.savez(folder / "traces.npz", **traces, **{f"experts|{run}": np.array(["law", "med"])})


def markdown_table(text: str) -> dict[tuple[str, ...], list[str]]:
    """The averages: (run, mode, switch rate, top k) -> texts of the other columns."""
    lines = [line for line in text.split("## ")[1].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {tuple(line[:4]): line[4:] for line in cells}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    mixed = mixing_rows() + mixing_rows("cached", prior="cached:law")
    results = write_results(folder / "results", expert_rows() + dense_rows() + mixed)
    write_traces(results)
    assert report([results], folder / "out") == folder / "out" / "report.html"
    return folder / "out"


def test_averages_are_the_macro_averages_by_hand(full: Path) -> None:
    table = markdown_table((full / "report.md").read_text())
    known = table["demix", "known", "", ""]
    assert known[:2] == [f"**{math.exp((3.0 + 3.2) / 2):.2f}**", "**3.1000**"]
    assert known[2] == f"**{(3.0 + 3.2) / 2 / 4 / math.log(2):.4f}**"
    assert known[3:] == ["–"] * 3
    assert table["dense", STACK, "", ""][:2] == [f"{math.exp(3.2):.2f}", "3.2000"]
    assert table["dense", STACK, "", ""][4] == "**4.6000**"
    assert table["demix", "uniform", "0.01", "1"][1] == "3.1200"
    assert table["demix", "uniform", "1", ""][4] == "5.1000"


def test_every_setting_is_a_line_and_only_the_lowest_are_bold(full: Path) -> None:
    table = markdown_table((full / "report.md").read_text())
    assert sum(key[:2] == ("demix", "uniform") for key in table) == 6
    bold = [(key, j) for key, line in table.items() for j, text in enumerate(line) if "**" in text]
    known, dense = ("demix", "known", "", ""), ("dense", STACK, "", "")
    assert sorted(bold) == sorted(
        [*((known, j) for j in range(3)), *((dense, j) for j in (3, 4, 5))]
    )


def test_bits_per_byte_of_text_that_is_lost_carry_a_warning(tmp_path: Path) -> None:
    rows = [
        make_row("known", "law", 4.0, expert="law") | {"round_trip": 0.8},
        make_row("known", "med", 4.0, expert="med") | {"round_trip": 1.0},
    ]
    report([write_results(tmp_path, rows)], tmp_path)
    for name in ("report.md", "report.html"):
        assert "bits/byte do not count for law: the tokenizer" in (tmp_path / name).read_text()


def test_the_best_expert_on_test_does_not_compete(tmp_path: Path) -> None:
    rows = [
        make_row("known", "law", 4.0, expert="law"),
        make_row("expert", "law", 3.0, expert="med"),
    ]
    report([write_results(tmp_path, rows)], tmp_path)
    table = markdown_table((tmp_path / "report.md").read_text())
    assert table["demix", BEST, "", ""][1] == "3.0000"
    assert table["demix", "known", "", ""][1] == "**4.0000**"


def test_an_average_over_fewer_domains_is_marked_and_does_not_compete(tmp_path: Path) -> None:
    rows = [*dense_rows(), make_row("uniform", "law", 2.0, switch_rate=0.0)]
    report([write_results(tmp_path, rows)], tmp_path)
    line = markdown_table((tmp_path / "report.md").read_text())["demix", "uniform", "0", ""]
    assert line == ["7.39 (1/2)", "2.0000 (1/2)", "0.7213 (1/2)", "–", "–", "–"]


def test_html_is_self_contained_and_balanced(full: Path) -> None:
    page = (full / "report.html").read_text(encoding="utf-8")
    assert "http" not in page
    assert "<script" not in page
    assert "url(" not in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == len(list((full / "plots").iterdir()))
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    parser = Balance()
    parser.feed(page)
    assert parser.open == []


class Balance(html.parser.HTMLParser):
    open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("img", "meta"):
            self.open = [*self.open, tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1] == tag
        self.open = self.open[:-1]


def test_every_plot_is_a_png_of_sensible_size_named_in_the_markdown(full: Path) -> None:
    from matplotlib.image import imread

    plots = {path.stem for path in (full / "plots").iterdir()}
    assert plots == {"experts", "posterior", "evolution", "modes", "switch_rate", "top_k"}
    text = (full / "report.md").read_text(encoding="utf-8")
    for name in plots:
        assert f"(plots/{name}.png)" in text
        picture = imread(full / "plots" / f"{name}.png")
        assert 300 < picture.shape[0] < 4000
        assert 500 < picture.shape[1] < 4000
        assert picture[..., :3].std() > 0.02  # not blank


def test_sections_without_rows_are_absent_and_named(tmp_path: Path) -> None:
    report([write_results(tmp_path, dense_rows())], tmp_path)
    text = (tmp_path / "report.md").read_text()
    titles = re.findall("^## (.*)$", text, re.MULTILINE)
    assert titles == ["Averages", "Every result", "Not shown"]
    for title in ("Experts on domains", "Mean posterior", "Perplexity by mode", "Top k"):
        assert f"\n{title}: no " in text
    assert not (tmp_path / "plots").exists()


def test_every_result_is_listed_and_collapsed(full: Path) -> None:
    text = (full / "report.md").read_text()
    rows = text[text.index("<details>") : text.index("</details>")]
    count = len(expert_rows()) + len(dense_rows()) + 2 * len(mixing_rows())
    assert rows.count("\n| demix |") + rows.count("\n| dense |") == count
    assert (full / "report.html").read_text().count("<details>") == 1


def write_checkpoints(folder: Path) -> list[Path]:
    """Experts law and med, then tweets too: law stays to the last bit, med loses 0.01."""
    old = [row | {"params_hash": "a"} for row in expert_rows()]
    old += [row | {"params_hash": "a"} for row in mixing_rows("cached")]
    new = [row | {"params_hash": "b"} for row in expert_rows()]
    for row in new:
        row["nats"] += 10 * (row["domain"] == "med")
    news = make_row("known", "tweets", 4.0, expert="tweets", novel=False, params_hash="b")
    new = [row | {"novel": False} for row in new] + [news]
    return [write_results(folder / "old", old), write_results(folder / "new", new)]


def table_under(text: str, header: str) -> list[list[str]]:
    lines = text[text.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_an_added_expert_before_and_after(tmp_path: Path) -> None:
    folders = write_checkpoints(tmp_path)
    report(folders, tmp_path)
    text = (tmp_path / "report.md").read_text()
    (line,) = table_under(text, "| nats/token, mean change")
    assert line == ["demix + tweets", "+0.0050 (2)", "-0.7000 (1)", "–", "tweets", "4 of 6"]
    lines = table_under(text, "|  | domain | group")
    assert {line.pop(0) for line in lines} == {"demix + tweets"}
    assert lines == [
        ["law", "known before", "expert law", "expert law", "3.0000", "3.0000", "0"],
        ["med", "known before", "expert med", "expert med", "3.2000", "3.2100", "+0.0100"],
        ["tweets", "gained", "cached, s=0", "expert tweets", "4.7000", "4.0000", "-0.7000"],
    ]
    assert (tmp_path / "plots" / "changes.png").exists()
    assert "Measured on 3,000 tokens of the test split" in text


def test_other_sections_show_the_newest_checkpoint_only(tmp_path: Path) -> None:
    folders = write_checkpoints(tmp_path)
    data = read_results(folders)
    assert {row["params_hash"] for row in data.rows} == {"b"}
    assert {setting.mode for setting in data.settings} == {"known", BEST}
    assert data.older == len(expert_rows()) + len(mixing_rows())
    assert data.groups == {"training": ["law", "med", "tweets"]}
    assert {row["params_hash"] for row in read_results(folders[::-1]).rows} == {
        "a"
    }  # the last folder's


def test_traces_of_an_older_checkpoint_are_not_shown(tmp_path: Path) -> None:
    folders = write_checkpoints(tmp_path)
    write_traces(folders[0])
    assert read_results(folders).traces == {}
    write_traces(folders[1])
    assert len(read_results(folders).traces) == 4


def test_a_checkpoint_that_comes_back_is_two_changes(tmp_path: Path) -> None:
    folders = write_checkpoints(tmp_path)
    data = read_results([*folders, folders[0]])
    assert [pair.label() for pair in data.changes] == ["demix + tweets", "demix - tweets"]
    back = {change.domain: change.nats for change in data.changes[1].changes}
    assert back == {"law": 0, "med": pytest.approx(-0.01), "tweets": pytest.approx(0.7)}


def test_two_folders_of_one_checkpoint_are_no_change(tmp_path: Path) -> None:
    rows = [row | {"params_hash": "a"} for row in expert_rows()]
    parts = [write_results(tmp_path / str(i), part) for i, part in enumerate((rows[:2], rows[2:]))]
    data = read_results(parts)
    assert data.changes == []
    assert len(data.rows) == len(rows)
    report(parts, tmp_path)
    assert "Before and after: no run at two checkpoints" in (tmp_path / "report.md").read_text()


def test_a_run_is_compared_with_the_one_it_began_from(tmp_path: Path) -> None:
    more = {"run": "runs/a/dense_tweets", "origin": "runs/a/dense", "mode": "known", "novel": False}
    rows = [row | more | {"nats": row["nats"] - 250} for row in dense_rows()]
    report([write_results(tmp_path, [*dense_rows(), *rows])], tmp_path)
    (line,) = table_under((tmp_path / "report.md").read_text(), "| nats/token, mean change")
    assert line[0] == "dense → dense_tweets"
    assert line[1:] == ["-0.2500 (2)", "-0.2500 (1)", "–", "tweets", "0 of 3"]


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    name = "<b>|é*$x_1$&"
    rows = expert_rows() + dense_rows() + mixing_rows()
    text = json.dumps(rows).replace('"law"', json.dumps(name)).replace("a/demix", "a/<i>mix|")
    results = write_results(tmp_path / "results", json.loads(text))
    write_traces(results, "runs/a/<i>mix|")
    report([results], tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;|é*$x_1$&amp;" in page
    assert "&lt;i&gt;mix|" in page
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert r"&lt;b&gt;\|é\*\$x_1\$&amp;" in markdown
    for content in (page, markdown):
        assert "<b>|" not in content
        assert "<i>" not in content


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    rows = dense_rows()
    other = [row | {"run": "runs/b/dense"} for row in rows]
    data = read_results([write_results(tmp_path / "a", rows), write_results(tmp_path / "b", other)])
    assert {setting.run for setting in data.settings} == {"a/dense", "b/dense"}


def test_older_checkpoints_and_other_splits_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = dense_rows()
    rows += [row | {"checkpoint": 6} for row in rows] + [rows[0] | {"split": "valid"}]
    report([write_results(tmp_path, rows)], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert (
        "4 rows of older checkpoints or experts, another split or measured again are not shown."
        in text
    )
    assert "step 7)" in text


def test_a_domain_novel_to_one_run_is_novel(tmp_path: Path) -> None:
    added = make_row("known", "tweets", 4.0, run="runs/a/more", expert="tweets", novel=False)
    data = read_results([write_results(tmp_path, [added, *dense_rows()])])
    assert data.groups == {"training": ["law", "med"], "novel": ["tweets"]}


def test_the_priors_of_the_domains_share_a_line_and_others_do_not(tmp_path: Path) -> None:
    names = {"law": "law", "med": "med", "tweets": "law"}
    rows = [make_row("cached", d, 3.0, prior=f"cached:{n}") for d, n in names.items()]
    data = read_results([write_results(tmp_path, rows)])
    found = {s.mode: list(cells) for s, cells in data.settings.items()}
    assert found == {"cached": ["law", "med"], "cached (law)": ["tweets"]}


def test_switch_rates_chosen_on_dev_share_a_line(tmp_path: Path) -> None:
    chosen = {"law": 0.01, "med": 0.0, "tweets": 0.3}
    rows = mixing_rows()
    for (domain, rate), nats in zip(chosen.items(), (2.9, 3.1, 4.4), strict=True):
        row = make_row("uniform", domain, nats, switch_rate=rate, switch_rate_from="dev")
        rows.append(row | {"posterior": {"law": 0.7, "med": 0.3}})
    report([write_results(tmp_path, rows)], tmp_path)
    text = (tmp_path / "report.md").read_text()
    table = markdown_table(text)
    assert table["demix", "uniform", "dev", ""][1] == "**3.0000**"
    assert table["demix", "uniform", "0.01", ""][1] == "3.1100"
    assert "not shown" not in text.split("## ")[1]


def test_no_partial_file_stays(full: Path) -> None:
    assert sorted(path.name for path in full.iterdir()) == ["plots", "report.html", "report.md"]
    assert not list(full.rglob("*.partial"))


def test_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(DemixError, match=f"{tmp_path / 'none'} has no results.json"):
        report([tmp_path / "none"], tmp_path)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"rows": 3}', '{"rows": [3]}', '{"rows": [{"run": "r"}]}', "\ud800"],
)
def test_damaged_results_are_one_line_that_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(DemixError, match=r"results\.json is damaged") as caught:
        report([tmp_path], tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"nats": math.nan}, {"nats": None}, {"tokens": 0}, {"domain": 5}, {"expert": None}]
)
def test_damaged_rows_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    rows = [*expert_rows(), expert_rows()[0] | change]
    with pytest.raises(DemixError, match=r"results\.json is damaged"):
        report([write_results(tmp_path, rows)], tmp_path)


def test_damaged_traces_are_named(tmp_path: Path) -> None:
    results = write_results(tmp_path, expert_rows())
    (results / "traces.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DemixError, match=r"traces\.npz is damaged"):
        report([results], tmp_path)


def test_no_rows_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DemixError, match=f"no results to report in {tmp_path}"):
        report([write_results(tmp_path, [])], tmp_path)


def test_missing_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DemixError, match=r"pip install 'demix_jax\[report\]'"):
        report([write_results(tmp_path, dense_rows())], tmp_path)
