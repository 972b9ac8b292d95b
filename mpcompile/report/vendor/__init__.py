"""Libraries of others that the pages carry, as they were published: THIRD_PARTY.md names versions and licences."""
