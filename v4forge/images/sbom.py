"""What an image is made of: a CycloneDX bill of materials, the same bytes for the same image.

The image itself is asked, in a container without network: dpkg for Debian's packages, /opt/venv for Python's.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone

from cyclonedx.contrib.license.exceptions import InvalidSpdxLicenseException
from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License
from cyclonedx.output.json import JsonV1Dot6
from docker import DockerClient
from docker.errors import APIError, ImageNotFound
from docker.types import LogConfig
from packageurl import PackageURL

from v4forge.images import refusals

SEPARATOR = "\x1e"
LICENCE_CHARACTERS = 80  # a longer License field is the licence's text

# torch/version.py says which CUDA the build is for; importing torch would load it.
PYTHON_PROBE = """
import importlib.metadata, json, runpy
found = []
for dist in importlib.metadata.distributions():
    meta, item = dist.metadata, {}
    item["name"], item["version"] = meta["Name"], dist.version
    item["expression"], item["licence"] = meta.get("License-Expression") or "", meta.get("License") or ""
    item["classifiers"] = [c for c in meta.get_all("Classifier") or [] if c.startswith("License ::")]
    if meta["Name"] == "torch":
        item["cuda"] = runpy.run_path(str(dist.locate_file("torch/version.py"))).get("cuda") or ""
    found.append(item)
print(json.dumps(found))
"""
DPKG_FORMAT = r"${db:Status-Status}\t${Package}\t${Version}\t${Architecture}\t${source:Package}\n"
PROBES = {
    "release": "cat /etc/os-release",
    "debian": f"dpkg-query -W -f '{DPKG_FORMAT}'",
    "licences": "grep -R --include=copyright -E '^License:' /usr/share/doc",
    "python": '/opt/venv/bin/python -I -B -c "$PYTHON_PROBE"',
}


def sbom(client: DockerClient, image: str, name: str, base_image: str, epoch: int) -> bytes:
    """CycloneDX 1.6 JSON of the image that the daemon has under this name or ID.

    `base_image` is the reference that it was built on, `epoch` the time that the document carries (SOURCE_DATE_EPOCH).
    """
    try:
        image_id = client.images.get(image).id
    except ImageNotFound:
        raise refusals.no_built_image(image) from None
    answers, notes = ask(client, image_id)
    python = json.loads(answers["python"] or "[]")
    debian = debian_packages(answers["debian"])
    if not python and not notes:
        notes.append("no Python packages: the image has no /opt/venv")
    if not debian and not notes:
        notes.append("no Debian packages: the image has no dpkg database")
    release = dict(line.split("=", 1) for line in answers["release"].splitlines() if "=" in line)
    system, version = (release.get(key, "").strip('"') for key in ("ID", "VERSION_ID"))
    components = [base_component(base_image)] if base_image else []
    if system:
        components.append(Component(type=ComponentType.OPERATING_SYSTEM, name=system, version=version, bom_ref=system))
    components += [python_component(item) for item in python]
    licences = debian_licences(answers["licences"])
    components += [debian_component(fields, system, version, licences) for fields in debian]
    return document(name, image_id, components, notes, epoch)


def ask(client: DockerClient, image_id: str) -> tuple[dict[str, str], list[str]]:
    """The probes' outputs by name, and notes on what could not be asked."""
    script = f"; printf '{SEPARATOR}'; ".join(f"{probe} 2>/dev/null" for probe in PROBES.values())
    container = client.containers.create(
        image_id,
        entrypoint=["sh", "-c", f"{script}; exit 0"],
        command=[],
        environment={"PYTHON_PROBE": PYTHON_PROBE},
        network_mode="none",
        read_only=True,
        log_config=LogConfig(type="json-file"),
    )
    try:
        container.start()
        container.wait()  # containers.run removes the container while its output is still being read
        output = container.logs(stdout=True, stderr=False)
    except APIError as error:
        if not re.search("executable file not found|no such file or directory", str(error)):
            raise
        return dict.fromkeys(PROBES, ""), ["no packages listed: the image has no shell to ask"]
    finally:
        container.remove(force=True)
    return dict(zip(PROBES, output.decode("utf-8").split(SEPARATOR), strict=True)), []


def document(name: str, image_id: str, components: Iterable[Component], notes: Sequence[str], epoch: int) -> bytes:
    """The document; its serial number follows from the image's ID."""
    image = Component(type=ComponentType.CONTAINER, name=name, version=image_id, bom_ref=name)
    bom = Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, image_id),
        metadata=BomMetaData(
            component=image,
            timestamp=datetime.fromtimestamp(epoch, timezone.utc),
            properties=[Property(name="v4forge:note", value=note) for note in notes],
        ),
        components=components,
    )
    bom.register_dependency(image, bom.components)
    return (JsonV1Dot6(bom).output_as_string(indent=1) + "\n").encode("utf-8")


def base_component(reference: str) -> Component:
    """The base image: by its digest where the reference has one."""
    name, _, digest = reference.partition("@")
    repository = name.rsplit(":", 1)[0] if ":" in name.rsplit("/", 1)[-1] else name
    purl = PackageURL("oci", None, repository.rsplit("/", 1)[-1], digest, {"repository_url": repository})
    properties = [Property(name="v4forge:role", value="base image")]
    return Component(
        type=ComponentType.CONTAINER,
        name=name,
        version=digest or None,
        purl=purl if digest else None,
        bom_ref="base image",
        properties=properties,
    )


def python_component(item: dict[str, str | list[str]]) -> Component:
    """A Python distribution; torch also says which CUDA it was built for."""
    name, version = str(item["name"]), str(item["version"])
    purl = PackageURL("pypi", None, name.lower().replace("_", "-"), version)
    stated = str(item["licence"]).strip()
    if item["expression"]:
        names = [str(item["expression"])]
    elif stated and len(stated) <= LICENCE_CHARACTERS and "\n" not in stated:
        names = [stated]
    else:
        names = [classifier.rsplit(" :: ", 1)[-1] for classifier in item["classifiers"]]
    properties = []
    if "cuda" in item:
        properties.append(Property(name="v4forge:torch", value=f"cuda {item['cuda']}" if item["cuda"] else "cpu"))
    return library(name, version, purl, names, properties)


def debian_packages(output: str) -> list[list[str]]:
    """[package, version, architecture, source package] of what dpkg-query lists as installed."""
    lines = [line.split("\t") for line in output.splitlines()]
    return [fields for status, *fields in lines if status == "installed"]


def debian_licences(output: str) -> dict[str, list[str]]:
    """Licences by package, as machine-readable copyright files state them; others state none."""
    stated: dict[str, set[str]] = {}
    for line in output.splitlines():
        path, _, licence = line.partition(":License:")
        package = path.removeprefix("/usr/share/doc/").split("/", 1)[0]
        if licence.strip():
            stated.setdefault(package, set()).add(licence.strip())
    return {package: sorted(names) for package, names in stated.items()}


def debian_component(fields: Sequence[str], system: str, release: str, licences: dict[str, list[str]]) -> Component:
    package, version, architecture, source = fields
    qualifiers = {"arch": architecture, "distro": f"{system}-{release}"}
    purl = PackageURL("deb", system, package, version, qualifiers)
    properties = [Property(name="v4forge:source-package", value=source)]
    return library(package, version, purl, licences.get(package, []), properties)


def library(
    name: str, version: str, purl: PackageURL, licences: Sequence[str], properties: Sequence[Property]
) -> Component:
    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=version,
        purl=purl,
        bom_ref=str(purl),
        licenses=licences_of(licences),
        properties=properties,
    )


def licences_of(names: Sequence[str]) -> list[License]:
    """One name may be an SPDX expression; several are SPDX identifiers where they are ones, else names."""
    factory = LicenseFactory()
    if len(names) == 1:
        return [factory.make_from_string(names[0])]
    found: list[License] = []
    for name in names:
        try:
            found.append(factory.make_with_id(name))
        except InvalidSpdxLicenseException:
            found.append(factory.make_with_name(name))
    return found
