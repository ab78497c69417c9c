"""What tools return, and the sentences that tell it."""

import json
from typing import Any

from hybrid.demo.data.grammar import fill
from hybrid.demo.data.talk import Talk
from hybrid.demo.data.toolbox import Declared

_SKIES = """sunny cloudy rainy windy foggy clear snowy stormy overcast hazy warm cold hot mild freezing humid dry cool icy
partly_cloudy mostly_sunny light_rain heavy_rain light_snow heavy_snow scattered_clouds clear_sky thunderstorms drizzle fog
hail showers very_hot very_cold""".split()


def result(talk: Talk, target: Declared, values: dict[str, Any]) -> tuple[str, str]:
    """What the tool returns for a call, and the sentence that tells it."""
    tool, rng = target.tool, talk.rng
    said = {label: _plain(value) for label, value in values.items()}
    if talk.chance(0.06):
        error = talk.words.text("error")
        content = rng.choice(
            [
                json.dumps({"error": error}),
                f"Error: {error}",
                json.dumps({"status": "error", "message": error}),
            ]
        )
        return content, f"Sorry, that did not work: {error}."
    if tool.result_kind == "weather":
        return _weather(talk, said["city"])
    if tool.result_kind == "ok":
        content = rng.choice(
            [
                '{"status": "ok"}',
                '{"success": true}',
                "ok",
                "done",
                '{"result": "ok"}',
                '{"status": "done"}',
                "OK",
            ]
        )
        return content, fill(tool.answer, said)
    drawn = _computed(talk, tool.key, values) or talk.words.text(tool.result_kind)
    sentence = fill(tool.answer, {**said, "result": drawn})
    value: Any = drawn
    if drawn.isdigit() and str(int(drawn)) == drawn and talk.chance(0.7):
        value = int(drawn)
    elif tool.result_kind == "money" and talk.chance(0.5) and str(float(drawn)) == drawn:
        value = float(drawn)
    if talk.chance(0.2):
        return drawn, sentence
    result = {rng.choice(tool.result_keys): value}
    if "status" not in result and talk.chance(0.25):
        result = {**result, "status": "ok"} if talk.chance(0.5) else {"status": "ok", **result}
    if talk.chance(0.25):
        echo = {target.names[label]: v for label, v in values.items()}
        if not set(echo) & set(result):
            result = {**echo, **result}
    return _dumps(talk, result), sentence


def _computed(talk: Talk, key: str, values: dict[str, Any]) -> str:
    """The result of a tool whose results are easily right; else nothing."""
    if key == "add_numbers":
        return str(values["a"] + values["b"])
    if key == "count_letters":
        return str(len(values["word"]))
    if key == "roll_dice":
        return str(talk.rng.randint(values["count"], 6 * values["count"]))
    return ""


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _dumps(talk: Talk, value: Any) -> str:
    compact = talk.chance(0.25)
    return json.dumps(value, ensure_ascii=False, separators=(",", ":") if compact else (", ", ": "))


def _weather(talk: Talk, city: str) -> tuple[str, str]:
    rng = talk.rng
    sky = rng.choice(_SKIES).replace("_", " ")
    if talk.chance(0.15):
        also = ["windy", "cold", "warm", "wet", "dry", "humid", "hot", "cool"]
        sky += " and " + rng.choice([word for word in also if word not in sky])
    degrees: float = rng.randint(-20, 40)
    if talk.chance(0.15):
        degrees = round(degrees + rng.randint(1, 9) / 10, 1)
    written = sky.capitalize() if talk.chance(0.5) else sky
    temperature = rng.choice(["temperature", "temperature", "temp", "degrees", "temp_c", "temperature_c"])
    condition = rng.choice(
        ["weather", "weather", "condition", "conditions", "sky", "description", "forecast", "summary"]
    )
    warm: Any = degrees
    told = f"{degrees} degrees"
    if talk.chance(0.3):
        marks = ["°C", " C", " degrees", "°", "°" if temperature.endswith("_c") else "°F"]
        warm = told = f"{degrees}{rng.choice(marks)}"
    roll = rng.random()
    if roll < 0.3:
        content: Any = {condition: written}
        sentence = f"The weather in {city}: {sky}."
    elif roll < 0.45:
        content = {temperature: warm}
        sentence = f"The temperature in {city} is {told}."
    elif roll < 0.9:
        content = {condition: written, temperature: warm}
        if talk.chance(0.4):
            content = {temperature: warm, condition: written}
        sentence = f"The weather in {city}: {sky}, {told}."
    else:
        content = f"{written}, {warm}" if isinstance(warm, str) else written
        sentence = (
            f"The weather in {city}: {sky}, {told}."
            if isinstance(warm, str)
            else f"The weather in {city}: {sky}."
        )
        return content, sentence
    if talk.chance(0.25):
        extra: Any = rng.choice(
            [{"humidity": rng.randint(20, 99)}, {"wind": f"{rng.randint(1, 60)} km/h"}]
            + ([] if "F" in told else [{"unit": "celsius"}])
        )
        content = {**content, **extra} if talk.chance(0.7) else {**extra, **content}
    if talk.chance(0.25):
        content = {rng.choice(["city", "location"]): city, **content}
    return _dumps(talk, content), sentence
