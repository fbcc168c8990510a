"""What a broken contract says: which library, which version of it, which call, and where it is used.

Each `test_LIBRARY_contract.py` holds one test for each private or undocumented call. The module's `LIBRARY` names the
package, `SEEN` the first and last version the calls were seen in, and a test's docstring says
"`call`, in FILE: what is relied on", FILE within ds_llmpq/. Imports stand inside the tests, so that a name that is gone
fails as the one call it was.
"""

from importlib import metadata

import pytest


class ContractBroken(AssertionError):
    """An installed library is not as we use it."""


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    library = getattr(pyfuncitem.module, "LIBRARY", None)
    try:
        return (yield)
    except Exception as error:
        if library is None:
            raise
        seen = " to ".join(pyfuncitem.module.SEEN)
        relied = " ".join(pyfuncitem.function.__doc__.split())
        reason = " ".join(str(error).split())[:300]
        raise ContractBroken(
            f"{library} {metadata.version(library)} is not as it was in {seen}. What has changed: {relied} "
            f"Found: {type(error).__name__}: {reason}"
        ) from error
