"""Words and values for the facts of traces, by kind.

None of the words is in a list of the evaluation or of the demo, so that what policies are measured
on is new to them. (tests/test_apart.py compares the lists.)
"""

from __future__ import annotations

import random
from collections.abc import Callable

_LISTS = {
    "person": """
        Aisha, Anneliese, Bao, Bjorn, Camila, Chidi, Dalia, Dmitri, Emeka, Esra, Farid, Freya,
        Goran, Gustavo, Hanneke, Hiroshi, Imani, Ingrid, Jamal, Joaquin, Katarina, Keiko, Leila,
        Lorenzo, Mateo, Mireille, Nadia, Noor, Olumide, Omar, Paloma, Priya, Rafael, Ravi,
        Sanjay, Siobhan, Takumi, Tomasz, Umberto, Usha, Valentina, Viktor, Wanda, Wen, Xiomara,
        Yara, Yusuf, Zeynep, Zofia, Ishaan""",
    "surname": """
        Abara, Bjornstad, Castellano, Dragomir, Eriksen, Fonseca, Grabowski, Haddad, Ibarra,
        Jankovic, Kowalczyk, Lindqvist, Moretti, Nakamura, Okafor, Petrov, Quintero, Rosenthal,
        Szabo, Tanaka, Ulloa, Venkatesan, Wojcik, Yilmaz, Zubair, Halvorsen, Bhattacharya,
        Delacroix, Mwangi, Oyelaran""",
    "town": """
        Antwerp, Bergen, Cordoba, Dundee, Esbjerg, Ferrara, Galway, Haarlem, Izmir, Jena,
        Krakow, Leiden, Malmo, Nantes, Odense, Porto, Riga, Split, Tampere, Utrecht, Valencia,
        Wismar, Zagreb, Bologna, Ghent, Aarhus, Gdansk, Linz, Brno, Maribor""",
    "street": """
        Foundry Street, Tannery Lane, Quayside Road, Windmill Avenue, Brewery Row, Juniper
        Close, Mortimer Terrace, Sycamore Drive, Harcourt Place, Linden Alley, Ropewalk Hill,
        Cedar Court, Station Approach, Priory Walk, Dovecote Way, Larch Crescent, Barracks Yard,
        Abbot Square, Viaduct Road, Saltpan Lane""",
    "weekday": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    "month": """
        January, February, March, April, May, June, July, August, September, October, November,
        December""",
    "firm": """
        Nordwind, Calibra, Helvex, Omnitron, Pallas Freight, Quantel, Ristova, Solvik, Tessera,
        Ubiquor, Varlo, Westline, Xenara, Yarrowtech, Zentrik, Brightforge, Cobaltix, Duraplan,
        Elmstone, Fenwright""",
    "project": """
        Halcyon, Meridian, Obsidian, Zephyr, Tundra, Quasar, Monsoon, Catalyst, Vertex, Equinox,
        Solstice, Nimbus, Tempest, Axiom, Paragon, Odyssey, Polaris, Sequoia, Cascade, Borealis""",
    "team": """
        billing, logistics, payroll, security, research, design, facilities, legal, procurement,
        quality, training, support, accounting, publishing, catering, maintenance""",
    "job": """
        welder, plumber, dentist, translator, florist, notary, pharmacist, surveyor, beekeeper,
        locksmith, paramedic, librarian, chemist, roofer, plasterer, tiler, caterer""",
    "ingredient": """
        cumin, lentils, tahini, yoghurt, parsley, paprika, zucchini, oats, cocoa, turmeric,
        couscous, chickpeas, basmati, mozzarella, coriander, fennel, capers, almonds, nutmeg,
        buttermilk, semolina, leeks, molasses, cardamom""",
    "dish": """
        risotto, goulash, lasagne, ramen, moussaka, paella, borscht, tiramisu, falafel, chowder,
        quiche, stroganoff, gnocchi, tagine, ratatouille, kedgeree, pierogi, enchiladas, laksa,
        shakshuka""",
    "object": """
        laptop, stapler, projector, thermos, backpack, microscope, tripod, toaster, printer,
        stopwatch, calculator, rucksack, headphones, flashlight, extension cord, whiteboard,
        router, scanner, kayak, wheelbarrow, sleeping bag, screwdriver, hairdryer, typewriter,
        barometer, tent peg""",
    "part": """
        gaskets, hinges, rivets, washers, brackets, filters, valves, spools, fuses, bearings,
        clamps, nozzles, grommets, sockets, spacers, pulleys, couplings, dowels, castors, shims""",
    "instrument": """
        cello, trombone, clarinet, bassoon, ukulele, harmonica, accordion, xylophone, mandolin,
        saxophone, banjo, piccolo, marimba, tuba, zither, oboe""",
    "language": """
        Finnish, Portuguese, Swahili, Korean, Icelandic, Turkish, Hungarian, Tagalog, Welsh,
        Bengali, Catalan, Estonian, Georgian, Vietnamese, Amharic, Maltese""",
    "pastime": """
        fencing, rowing, archery, badminton, pottery, origami, bouldering, yoga, snooker, judo,
        calligraphy, orienteering, ballroom dancing, birdwatching, canoeing, darts""",
    "shade": """
        turquoise, maroon, beige, teal, magenta, ochre, khaki, lavender, burgundy, indigo,
        scarlet, mauve, charcoal, saffron, apricot, lilac""",
    "material": """
        linen, plywood, bamboo, slate, aluminium, corduroy, porcelain, fibreglass, rubber, felt,
        concrete, flannel, wicker, enamel, polyester, limestone""",
    "creature": """
        alpaca, lynx, ferret, gecko, heron, iguana, koala, llama, meerkat, newt, ocelot,
        platypus, quokka, reindeer, sloth, tapir, wombat, yak, zebra, chinchilla""",
    "crop": """
        barley, sorghum, chicory, rapeseed, kale, radishes, okra, beetroot, rhubarb,
        gooseberries, sunflowers, asparagus, artichokes, turnips, alfalfa, millet""",
    "reason": """
        a punctured tyre, the flooded basement, a leaking boiler, missing signatures, the bank
        holiday, a burst pipe, an expired visa, the rail strike, a sprained ankle, a stomach
        bug, a double booking, the power cut, an unpaid invoice, a printing error, the heatwave,
        a lost passport, the road works, a software update""",
    "service": """
        auth-gateway, mail-relay, image-resizer, order-queue, search-index, session-store,
        report-builder, rate-limiter, feed-parser, audit-writer, token-issuer, backup-agent,
        cart-service, geo-lookup, job-scheduler, push-notifier""",
    "setting": """
        max_retries, cache_ttl, pool_size, batch_limit, read_timeout, log_rotation,
        worker_count, upload_quota, heartbeat_ms, queue_depth, page_size, burst_rate,
        grace_period, flush_interval, shard_total, backoff_base""",
    "function": """
        parse_invoice, merge_rows, trim_padding, load_fixture, render_chart, hash_payload,
        split_batches, notify_admins, purge_drafts, resolve_alias, encode_frame, fetch_quota,
        rotate_keys, sort_ledger, scale_vector, audit_trail""",
    "module": """
        billing.py, tensors.py, router.go, cursor.rs, pages.ts, quotas.py, mailer.rb,
        layout.css, schema.sql, worker.js, ledger.py, vectors.cpp, tokens.rs, forms.tsx,
        cron.sh, billing_v2.py""",
    "fault": """
        disk quota exceeded, certificate expired, checksum mismatch, connection reset, stale
        lock file, out of file handles, deadlock detected, malformed header, permission denied,
        clock skew, missing migration, duplicate primary key, unsupported codec, truncated
        upload""",
    "shop": """
        bakery, pharmacy, stationer, greengrocer, haberdasher, delicatessen, ironmonger,
        optometrist, pawnbroker, launderette, nursery, bicycle workshop, cheesemonger, photo
        studio""",
    "room": """
        Aurora room, Baltic room, Cobalt room, Dune room, Ember room, Fjord room, Gobi room,
        Helix room, Iris room, Juno room, Krypton room, Lotus room, Mesa room, Nile room""",
    "film": """
        The Glass Ferry, Forty Winters, Tin Lions, Static, Before the Tide, Low Orbit, Salt and
        Ash, Kite Weather, The Fourth Tenant, Half a Map, Muted Engines, Blind Harvest,
        Northbound, An Odd Number""",
    "course": """
        statistics, thermodynamics, palaeography, macroeconomics, phonetics, cartography,
        metallurgy, jurisprudence, botany, acoustics, epidemiology, linguistics, hydraulics,
        ethics, topology, taxidermy""",
}

#: Words by kind.
WORDS: dict[str, tuple[str, ...]] = {
    kind: tuple(" ".join(text.split()).split(", ")) for kind, text in _LISTS.items()
}


def _shaped(*shapes: str) -> Callable[[random.Random], str]:
    """Draws a value of one of the shapes: # is a digit (never a leading 0), @ a capital letter,
    % a hexadecimal digit."""

    def draw(rng: random.Random) -> str:
        made = ""
        for sign in rng.choice(shapes):
            if sign == "#":
                made += rng.choice("0123456789" if made[-1:].isdigit() else "123456789")
            elif sign == "@":
                made += rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ")
            elif sign == "%":
                made += rng.choice("0123456789abcdef")
            else:
                made += sign
        return made

    return draw


def _time(rng: random.Random) -> str:
    hour, minute = rng.randrange(1, 13), rng.randrange(0, 60, 5)
    return f"{hour}:{minute:02} {rng.choice(('am', 'pm'))}"


def _date(rng: random.Random) -> str:
    return f"{rng.randrange(1, 29)} {rng.choice(WORDS['month'])}"


#: Values by kind, drawn.
VALUES: dict[str, Callable[[random.Random], str]] = {
    "time": _time,
    "date": _date,
    "price": _shaped("$#.##", "$##.##", "$###", "$#,###"),
    "phone": _shaped("0### ### ###", "555-##-##", "+## ### ####"),
    "grams": _shaped("## grams", "### grams"),
    "length": _shaped("## cm", "### cm", "#.# metres", "##.# metres"),
    "weight": _shaped("## kg", "#.# kg", "### kg"),
    "degrees": _shaped("## degrees", "-# degrees", "#.# degrees"),
    "count": _shaped("##", "###"),
    "share": _shaped("## %", "#.# %"),
    "minutes": _shaped("## minutes", "### minutes"),
    "year": _shaped("19##", "20##"),
    "code": _shaped("@@-####", "####@", "@##-@##", "#### ####"),
    "plate": _shaped("@@ ### @@", "@@@ ####"),
    "version": _shaped("v#.#.#", "v#.##.#", "#.##"),
    "address": _shaped("10.#.##.###", "172.16.#.##", "192.168.##.##"),
    "digest": _shaped("%%%%%%%%", "%%%%-%%%%"),
    "seat": _shaped("#@", "##@"),
    "flat": _shaped("#@", "###"),
    "shelf": _shaped("@#-##", "@##"),
    "port": _shaped(
        "####",
    ),
    "milliseconds": _shaped("## ms", "### ms"),
}


def draw(kind: str, rng: random.Random) -> str:
    """A word or value of the kind."""
    return VALUES[kind](rng) if kind in VALUES else rng.choice(WORDS[kind])
