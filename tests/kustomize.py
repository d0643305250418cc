"""Renders k8s/ as `kubectl kustomize` does, as far as k8s/ goes; whatever else a kustomization says is refused.

Where kubectl is there, a test compares the two.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import yaml

ALONE = {"Namespace"}  # kinds that belong to no namespace
FIELDS = {
    "apiVersion",
    "kind",
    "namespace",
    "labels",
    "resources",
    "components",
    "patches",
    "generatorOptions",
    "configMapGenerator",
    "replacements",
    "images",
}


def render(folder):
    """The objects of an overlay, in the order in which its files name them."""
    return _transformed(Path(folder), [])


def _transformed(folder, objects):
    """`objects`, to which this folder's kustomization adds its own and which it changes."""
    given = _load(folder / "kustomization.yaml")[0]
    _only(given, FIELDS, folder)
    objects = list(objects)
    for name in given.get("resources", []):
        path = folder / name
        objects += render(path) if path.is_dir() else _load(path)
    for one in given.get("configMapGenerator", []):
        _generate(one, given.get("generatorOptions", {}) | one.get("options", {}), folder, objects)
    for name in given.get("components", []):
        objects = _transformed(folder / name, objects)
    for patch in given.get("patches", []):
        _patch(patch, folder, objects)
    for one in objects:
        if "namespace" in given and one["kind"] not in ALONE:
            one["metadata"]["namespace"] = given["namespace"]
        for labels in given.get("labels", []):
            _only(labels, {"pairs"}, folder)
            one["metadata"].setdefault("labels", {}).update(labels["pairs"])
    for replacement in given.get("replacements", []):
        _replace(replacement, objects)
    for image in given.get("images", []):
        _only(image, {"name", "newName", "newTag"}, folder)
        _set_image(objects, image)
    return objects


def _load(path):
    # Through text again: an alias must not stay one and the same object in two places.
    return [copy.deepcopy(one) for one in yaml.safe_load_all(path.read_text()) if one is not None]


def _only(given, fields, where):
    unknown = set(given) - fields
    assert not unknown, f"{where}: tests/kustomize.py does not know {sorted(unknown)}"


def _generate(given, options, folder, objects):
    _only(given, {"name", "namespace", "behavior", "options", "files", "literals"}, folder)
    assert options == {"disableNameSuffixHash": True}, f"{folder}: {given['name']} would get a hash in its name"
    data = {Path(name).name: (folder / name).read_text() for name in given.get("files", [])}
    data |= dict(word.split("=", 1) for word in given.get("literals", []))
    metadata = {key: given[key] for key in ("name", "namespace") if key in given}
    if given.get("behavior", "create") == "create":
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
        return
    assert given["behavior"] == "merge", folder
    (there,) = [one for one in objects if one["kind"] == "ConfigMap" and one["metadata"]["name"] == given["name"]]
    there["data"] |= data


def _patch(given, folder, objects):
    _only(given, {"path", "patch", "target"}, folder)
    _only(given["target"], {"kind", "name"}, folder)
    chosen = [one for one in objects if _is(one, given["target"])]
    assert chosen, f"{folder}: a patch of {given['target']}, which is not there"
    change = yaml.safe_load(given["patch"] if "patch" in given else (folder / given["path"]).read_text())
    for one in chosen:
        if isinstance(change, list):
            for operation in change:
                _operate(one, copy.deepcopy(operation))
        else:  # lists of kinds that Kubernetes knows would be merged, by keys of their own
            assert one["apiVersion"].startswith("ray.io/"), f"{folder}: patches of {one['kind']} must be lists"
            _merge(one, {"spec": copy.deepcopy(change["spec"])})


def _is(one, wanted):
    return one["kind"] == wanted["kind"] and wanted.get("name") in (None, one["metadata"]["name"])


def _operate(one, operation):
    """One operation of RFC 6902."""
    *way, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    place = one
    for part in way:
        place = place[int(part)] if isinstance(place, list) else place[part]
    if operation["op"] == "add" and isinstance(place, list):
        place.insert(len(place) if last == "-" else int(last), operation["value"])
        return
    assert operation["op"] in ("add", "replace"), f"tests/kustomize.py does not know the operation {operation['op']}"
    assert operation["op"] == "add" or last in place, f"{operation['path']}: not there"
    place[last] = operation["value"]


def _merge(one, change):
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(one.get(key), dict):
            _merge(one[key], value)
        else:
            one[key] = value


def _replace(given, objects):
    source = dict(given["source"])
    field = source.pop("fieldPath")
    (there,) = [one for one in objects if _is(one, source)]
    for target in given["targets"]:
        (path,) = target["fieldPaths"]
        assert re.fullmatch(r"\w+", field), field
        assert re.fullmatch(r"\w+\.\w+", path), path
        assert target["options"] == {"create": True}
        outer, inner = path.split(".")
        for one in objects:
            if _is(one, target["select"]):
                one[outer][inner] = copy.deepcopy(there[field])


def _set_image(value, image):
    if isinstance(value, list):
        for item in value:
            _set_image(item, image)
    elif isinstance(value, dict):
        for container in value.get("containers", []) + value.get("initContainers", []):
            if container["image"].split(":")[0] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
        for item in value.values():
            _set_image(item, image)
