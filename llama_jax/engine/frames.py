"""Frames: what an error keeps alive."""

import traceback


def drop_locals(error: BaseException) -> None:
    """Empty the frames that an error came through: they hold the whole decode state."""
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        link = chain.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            traceback.clear_frames(link.__traceback__)
            chain += [link.__cause__, link.__context__]
