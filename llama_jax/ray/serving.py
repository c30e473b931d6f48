"""stub"""


def serve_app(): ...
