"""A plugin of pytest that prints why a test failed at once, not only when all tests have ended."""


def pytest_runtest_logreport(report: object) -> None:
    if report.failed:
        reason = getattr(report.longrepr, "reprcrash", None) or report.longrepr
        first, *_ = str(getattr(reason, "message", reason)).splitlines() or [""]
        print(f"\nFAILED {report.nodeid} - {first}", flush=True)
