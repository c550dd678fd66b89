"""train.py, except that any use of a socket raises an error: a run that ends well has used no network."""
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
