"""The command ``fedtalora``: its commands by what they are about, and what they print."""
