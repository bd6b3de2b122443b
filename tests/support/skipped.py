"""A plugin: ``pytest --skipped`` runs the tests that the last run skipped.

After a run without some extra, whatever it lacked for is tested in a second one with it, and no
list says what that is.
"""

from __future__ import annotations

import pytest

_KEY = "kvp_edge/skipped"  # in pytest's cache: ids of tests, and of files that were skipped whole


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--skipped", action="store_true", help="only the tests that the last run skipped"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Skipped(config), "kvp_edge-skipped")


class _Skipped:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.found: set[str] = set()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.found.add(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.found.add(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if not self.config.getoption("--skipped"):
            return
        cache = _cache(self.config)
        last = cache.get(_KEY, None) if cache else None
        if last is None:
            raise pytest.UsageError("--skipped: there was no run before that could skip anything")
        wanted = [i for i in items if i.nodeid in last or i.nodeid.split("::")[0] in last]
        self.config.hook.pytest_deselected(items=[i for i in items if i not in wanted])
        items[:] = wanted

    def pytest_sessionfinish(self) -> None:
        cache = _cache(self.config)
        if cache and not self.config.getoption("collectonly"):
            cache.set(_KEY, sorted(self.found))


def _cache(config: pytest.Config) -> pytest.Cache | None:
    return getattr(config, "cache", None)  # there is none with -p no:cacheprovider
