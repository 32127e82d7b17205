"""The texts of the small text run that several tests open: what is asked of which device."""

DEVICES = ("lamp", "door", "radio", "oven")
PHRASES = ("switch the {} on", "is the {} off by now", "please move my {} a little", "{}", "what does a new {} cost us")
