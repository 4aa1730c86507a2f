"""What goes wrong has a type and a reason: python examples/errors.py."""

from lowbit import Client, InvalidArgumentError, LowbitError, ModelNotFoundError

with Client() as client:
    try:
        client.generate("no-such-model", "hello").text()
    except ModelNotFoundError as error:
        print(error)
    try:
        client.generate("no-such-model", "hello", temperature=-1, top_p=2).text()
    except InvalidArgumentError as error:
        for violation in error.violations:
            print(f"{violation.field}: {violation.description}")
    try:
        client.load("no-such-model").wait()
    except LowbitError as error:
        print(f"{error.code}: {error.reason}")
