"""A night: the logs up to a day -> a dataset on top of the newest one -> a run from the published model's parameters ->
both models on that day -> the gate -> latest.json.

Every stage leaves its own result and is not done again: the same command goes on after a crash. One night at a time
works in `out`; one that was stopped and wakes up when another has taken over publishes nothing. The ids of a vocabulary
never change, so any two datasets of `out` agree about every key.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl

from cdr_dist.configuration import TrainConfig
from cdr_dist.data import storage
from cdr_dist.data.dataset import Manifest, read_manifest
from cdr_dist.data.prepare import prepare
from cdr_dist.errors import UserError
from cdr_dist.production.drift import changes, day_from, day_of
from cdr_dist.production.gate import Scores, Verdict, decide
from cdr_dist.production.options import Request, check_day
from cdr_dist.production.publishing import Publisher, Version
from cdr_dist.production.recommendation_options import RecommendOptions
from cdr_dist.training import lease
from cdr_dist.training.lease import Lease
from cdr_dist.training.run_folder import SCORES, RunFolder

log = logging.getLogger(__name__)

OLD_SCORES = "scores_published.parquet"


def nightly(request: Request) -> dict[str, Any]:
    """Does what is left of the night -> night.json. UserError, Stopped."""
    date, publisher = request.own.date, Publisher(request.own.out)
    known = publisher.read_night(date)
    _check_same(known, request, publisher)
    if known.get("outcome"):
        return known | {"again": True}
    with Lease(publisher.out) as held:
        night = _Night(request, publisher, lambda: lease.check(storage.join(publisher.out, lease.FILE), held.token))
        return night.run()


def _check_same(known: dict[str, Any], request: Request, publisher: Publisher) -> None:
    asked = known.get("asked", request.content())
    if asked != request.content():
        differ = [name for name, value in request.content().items() if asked.get(name) != value]
        raise UserError(
            f"{publisher.night(request.own.date)}: was begun with other options ({', '.join(differ)}); "
            "finish it with those, or choose another out="
        )


class _Night:
    """still_ours: raises where another night has taken over."""

    def __init__(self, request: Request, publisher: Publisher, still_ours: Callable[[], None]) -> None:
        self._request, self._publisher, self._still_ours = request, publisher, still_ours
        self._date = request.own.date
        self._known = publisher.read_night(self._date) | {"date": self._date, "asked": request.content()}

    def run(self) -> dict[str, Any]:
        manifest = self._dataset()
        published = self._published()
        self._train(published)
        verdict = self._judge(published, manifest)
        self._still_ours()
        outcome = self._publish(verdict, published)
        self._recommend()
        gone = self._publisher.retire(self._request.own.keep)
        if gone:
            log.info("old versions went: %s", ", ".join(gone))
        self._known |= {"outcome": outcome, "published": outcome == "published"}
        self._page()
        self._note()
        return self._known

    def _note(self, **more: Any) -> None:
        self._still_ours()
        self._known |= more
        self._publisher.write_night(self._date, self._known)

    def _dataset(self) -> Manifest:
        """The night's dataset, on top of the newest one, whichever night that is of."""
        out = self._publisher.dataset(self._date)
        if self._known.get("dataset"):
            manifest = read_manifest(out)
            if "day" not in self._known:  # killed between the two
                self._look_at_the_day(out, manifest)
            return manifest
        if not storage.exists(storage.join(out, "manifest.json")):
            check_day(self._request.prepare, self._date)
            self._note(extends=self._publisher.newest_dataset(self._date))
        log.info("the dataset of %s", self._date)
        manifest = prepare(self._request.prepare_options(out, self._known["extends"]))
        self._still_ours()
        self._publisher.grown(self._date)
        self._note(dataset=out, counts=manifest.counts, unknown=manifest.unknown, unseen=manifest.unseen)
        self._look_at_the_day(out, manifest)
        return manifest

    def _look_at_the_day(self, folder: str, manifest: Manifest) -> None:
        """What the day's rows are like, beside those of the last night before it that has looked."""
        day, found = day_of(folder, manifest), []
        earlier = (date for date in reversed(self._publisher.nights()) if date < self._date)
        days = ((date, day_from(self._publisher.read_night(date).get("day"))) for date in earlier)
        against, before = next((known for known in days if known[1] is not None), ("", None))
        if before is not None:
            found = changes(before, day, self._request.own.drift)
        for change in (c for c in found if c.large):
            log.warning("drift: %s %.4g, %.4g on %s", change.of, change.now, change.before, against)
        drift = {"against": against, "changes": [vars(c) | {"large": c.large} for c in found]} if found else None
        self._note(day=asdict(day), drift=drift)

    def _published(self) -> Version | None:
        """The version that this night starts from and is measured against: the published one when it began to train.

        None: there is none yet, or it is of a later day, and so knows what this night's model is tested on.
        """
        if "against" not in self._known:
            latest = self._publisher.latest()
            earlier = latest is not None and latest.date < self._date
            self._note(against=vars(latest) if latest and earlier else None)
        against = self._known["against"]
        return Version(**against) if against else None

    def _config(self, published: Version | None) -> TrainConfig:
        start = published.run if published else ""
        data, run = self._publisher.dataset(self._date), self._publisher.run(self._date)
        return self._request.train_config(data, run, start)

    def _train(self, published: Version | None) -> None:
        from cdr_dist.training.launch import train

        config = self._config(published)
        log.info("training %s%s", config.run, f" from {config.warm_start.run}" if config.warm_start.run else "")
        summary = train(config, config.data, quiet=True)
        if "auc" not in summary["metrics"]["test"]:
            raise UserError(
                f"{config.run}: ended in pre-training, at trainer.max_steps={config.trainer.max_steps}, so there is "
                "nothing to publish; raise it, with another out= or without this date's folders"
            )
        if "metrics" not in self._known:
            self._note(run=config.run, metrics=summary["metrics"], parameters_sha256=summary["parameters_sha256"])

    def _judge(self, published: Version | None, manifest: Manifest) -> Verdict:
        from cdr_dist.training.evaluation_job import evaluate_run

        new, old = _scores(RunFolder(self._publisher.run(self._date)).file(SCORES)), None
        if published is not None:
            uri = self._publisher.night(self._date, OLD_SCORES)
            if "metrics_published" not in self._known:
                log.info("the published model of %s on %s", published.date, self._date)
                found = evaluate_run(published.run, "test", uri, data=self._publisher.dataset(self._date))[1]
                self._note(metrics_published=found)
            old = _scores(uri)
        unseen = manifest.unseen["test"]
        verdict = decide(self._request.own.gate, new, old, 1 - max(unseen["user"], unseen["item"]))
        against = verdict.against
        self._note(
            gate=[vars(check) for check in verdict.checks],
            difference=None if against is None else vars(against),
        )
        return verdict

    def _publish(self, verdict: Verdict, published: Version | None) -> str:
        """`published`, or why not."""
        latest = self._publisher.latest()
        if latest is not None and latest.date > self._date:
            return f"kept {latest.date}: {self._date} is an earlier day"
        if not verdict.passes:
            return f"kept {latest.date if latest else 'nothing'}: {verdict}"
        data, run = self._publisher.dataset(self._date), self._publisher.run(self._date)
        self._publisher.publish(Version(self._date, run, data, str(self._known["parameters_sha256"])))
        return "published"

    def _recommend(self) -> None:
        """By the published version, of whatever night, to the users of this one; not for a day that is made up for."""
        latest = self._publisher.latest()
        if not self._request.own.recommendations or latest is None or latest.date > self._date:
            return
        from cdr_dist.production.recommendation_job import recommend, told

        data, out = self._publisher.dataset(self._date), self._publisher.recommendations(self._date)
        log.info("recommendations by the model of %s", latest.date)
        grown = data if latest.dataset != data else ""
        options = RecommendOptions(**asdict(self._request.own.recommend), run=latest.run, data=grown, out=out)
        found = recommend(options)
        log.info("%s", told(found, out))
        self._still_ours()
        self._publisher.serve(self._date, latest)
        self._note(recommendations={name: found[name] for name in found if name not in ("asked", "parts")})

    def _page(self) -> None:
        """Whatever is wrong with the page, the night is over."""
        from cdr_dist.evaluation.report import page
        from cdr_dist.production.nightly_report import report_of_night

        try:
            before = [self._publisher.read_night(d) for d in self._publisher.nights() if d < self._date]
            self._publisher.write_page(self._date, page(report_of_night(self._known, before)))
        except Exception as error:
            log.warning("no page: %s: %s", type(error).__name__, error)


def _scores(uri: str) -> Scores:
    frame = pl.read_parquet(io.BytesIO(storage.read_bytes(uri))).sort("example", "label", maintain_order=True)
    user, label, score = (frame[name].to_numpy() for name in ("user", "label", "score"))
    return Scores(user.astype(np.int64), label.astype(np.float64), score.astype(np.float64))
