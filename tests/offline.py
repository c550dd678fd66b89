"""train.py, but a socket of any kind ends it: what runs here sends nothing and asks nobody."""
import sys
from pathlib import Path


def refuse(event, args):
    if event.startswith("socket."):
        raise RuntimeError(f"{event}{args}")


if __name__ == "__main__":
    sys.addaudithook(refuse)
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import train
    train.main()
