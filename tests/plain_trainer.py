"""The parts of a trainer that a test does not look at."""


class PlainTrainer:
    targets = ("plain",)

    @staticmethod
    def resolve(options):
        return dict(options)

    @staticmethod
    def adopt(options, say):
        return dict(options)

    @staticmethod
    def describe(options):
        return "nothing on nothing"

    @staticmethod
    def versions():
        return {"plain": "1.0"}

    @staticmethod
    def snippet(expression, space, loss_weight=1.0):
        return f"loss = {expression!r}"

    @staticmethod
    def spaces(options):
        return {"cls": "two_stage_cls", "reg": "reg"}

    @staticmethod
    def check(options):
        return {"classes": [], "images": {}}

    @staticmethod
    def prepare(options):
        return b"weights"

    @staticmethod
    def export(options, found, *args):
        return {}

    def __init__(self, options, prepared):
        assert prepared == b"weights"

    def train(self, trial, progress=None):
        raise NotImplementedError
