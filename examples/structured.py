"""Outputs of a given form: python examples/structured.py MODEL."""

import json
import sys

from lowbit import Client

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "languages": {"enum": [["Python"], ["Go"], ["Python", "Go"]]},
    },
    "required": ["name", "age", "languages"],
    "additionalProperties": False,
}

(model,) = sys.argv[1:]
with Client() as client:
    about = "Ada is 36 and writes Python. As JSON: "
    person = client.generate(model, about, json_schema=PERSON, temperature=0).text()
    print("person:", json.dumps(json.loads(person)))

    review = "Review: I loved every minute of it.\nSentiment: "
    options = ["positive", "negative", "mixed"]
    print("sentiment:", client.generate(model, review, choice=options, temperature=0).text())

    when = "The first moon landing, as year-month-day: "
    date = client.generate(model, when, regex="[0-9]{4}-[0-9]{2}-[0-9]{2}", temperature=0)
    print("date:", date.text())

    rules = 'start: turn ", then " turn\nturn: "turn left" | "turn right"'
    way = client.generate(model, "Directions: ", grammar=rules, temperature=0)
    print("way:", way.text())
