"""Break something in a process of its own, so that it is whole again afterwards."""

import os
import traceback
from collections.abc import Callable


def in_fork(broken: Callable[[], None], check: Callable[[], None]) -> None:
    """Break something in a forked process and check there.

    Raises:
        AssertionError: If the check failed, or there was an error of another kind.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            broken()
            check()
            code = 0
        except AssertionError:
            code = 3
        except BaseException:  # noqa: BLE001 - a forked child must not come back
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 3), f"an error of another kind, exit code {code}"
    assert code == 0, f"broken, it is seen: {broken.__doc__}"
