"""Sentence frames of traces: ways to tell a fact, and ways to ask for it.

A slot is a kind of kvp_edge/traces/vocabulary.py in braces; a digit tells two of one kind apart
(``{person}``, ``{person2}``). A statement is a clause without a full stop, which begins in lower
case unless with a slot: it may stand alone or inside another sentence.

Every slot of a question except the one asked for identifies the fact: no two facts of a text share
a word or value. A fact in several parts is told in as many places, and some of its questions need
all of them.

No frame here is one of the evaluation's, and neither is a run of six words. (tests/test_apart.py
compares them.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_SLOT = re.compile(r"\{(\w+?)(\d?)\}")


def slots(text: str) -> dict[str, str]:
    """The slots of a text, and the kind of each."""
    return {kind + digit: kind for kind, digit in _SLOT.findall(text)}


@dataclass(frozen=True)
class Frame:
    """A fact.

    Attributes:
        domain: what it is about.
        parts: the ways to tell each of its parts.
        questions: by the slot that is asked for, the ways to ask for it.
    """

    domain: str
    parts: tuple[tuple[str, ...], ...]
    questions: dict[str, tuple[str, ...]]

    @property
    def slots(self) -> dict[str, str]:
        return {name: kind for part in self.parts for name, kind in slots(part[0]).items()}


@dataclass(frozen=True)
class Listing:
    """Pairs of a key and a value, one on each line.

    Attributes:
        domain: what it is about.
        headings: ways to introduce it.
        key, value: slots of ``lines`` and ``questions``, which are kinds.
        lines: ways to write a pair; all of a listing are written in the same way.
        questions: as in ``Frame``.
    """

    domain: str
    headings: tuple[str, ...]
    key: str
    value: str
    lines: tuple[str, ...]
    questions: dict[str, tuple[str, ...]]


def _ways(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def _fact(domain: str, *parts: str, **questions: str) -> Frame:
    return Frame(
        domain, tuple(map(_ways, parts)), {slot: _ways(text) for slot, text in questions.items()}
    )


def _listing(
    domain: str, key: str, value: str, headings: str, lines: str, **questions: str
) -> Listing:
    asked = {slot: _ways(text) for slot, text in questions.items()}
    return Listing(domain, _ways(headings), key, value, _ways(lines), asked)


FRAMES = (
    # -- appointments and dates
    _fact(
        "appointments",
        """
        {person} sees the {job} on {weekday} at {time}
        the {job} expects {person} at {time} on {weekday}
        on {weekday}, {time}, {person} has to be at the office of the {job}
        """,
        weekday="""
        Which day of the week is {person} due at the office of the {job}?
        On what weekday does the {job} see {person}?
        """,
        time="""
        At what hour does the {job} expect {person}?
        When exactly, by the clock, must {person} turn up on {weekday}?
        """,
        job="Whom does {person} have an appointment with on {weekday}?",
    ),
    _fact(
        "appointments",
        """
        the {team} meeting has been moved to {weekday} because of {reason}
        because of {reason}, the {team} people now meet on {weekday}
        """,
        weekday="""
        To which weekday did the {team} meeting move?
        Which day do the {team} people meet now?
        """,
        reason="""
        Why was the {team} meeting moved?
        What made the {team} people change the day of their meeting?
        """,
    ),
    _fact(
        "dates",
        """
        {person} was born on {date} {year} in {town}
        the birth certificate of {person} says {town}, {date} {year}
        """,
        town="In which town was {person} born?\nWhere did {person} come into the world?",
        year="What year was {person} born in?\nHow does the birth year of {person} read?",
        date="Which day do we celebrate for {person}'s birthday?",
    ),
    _fact(
        "dates",
        """
        the lease with {firm} runs out on {date}
        {firm} will get its flat back when the lease ends on {date}
        """,
        date="""
        When does the lease with {firm} end?
        Until which date may we stay in the flat that {firm} owns?
        """,
    ),
    _fact(
        "deadlines",
        """
        project {project} has to be delivered to {firm} before {date}
        {firm} insists on getting project {project} by {date}
        """,
        date="""
        What is the deadline of project {project}?
        By when does {firm} want its project?
        """,
        firm="Which company is project {project} made for?\nWho is the customer behind {project}?",
    ),
    # -- money
    _fact(
        "prices",
        """
        the {object} in the window of the {shop} costs {price}
        {price} is what the {shop} wants for the {object}
        you can have the {object} for {price} at the {shop}
        """,
        price="""
        How much does the {shop} ask for the {object}?
        What would I pay at the {shop} for the {object}?
        How expensive is the {object}?
        """,
        shop="Which shop sells the {object}?\nWhere could I buy the {object}?",
        object="What is on offer in the window of the {shop}?",
    ),
    _fact(
        "prices",
        """
        {person} still owes {person2} {price} for the {object}
        the {object} was bought with {price} that {person} borrowed from {person2}
        """,
        price="How large is the debt of {person} to {person2}?\nWhat sum does {person} owe?",
        person2="Who lent {person} the money?\nTo whom must {person} pay something back?",
        object="What did {person} borrow money for?",
    ),
    _fact(
        "prices",
        """
        the {surname} family pays {price} a month for gas and water
        every month {price} goes from the {surname} family to the gas and water works
        """,
        price="""
        What does the {surname} family spend monthly on gas and water?
        How high is the gas and water bill of the {surname} household?
        """,
    ),
    _fact(
        "wages",
        """
        as a {job} in {town} {person} earned {price} a week
        {person} got {price} every week for working as a {job} in {town}
        """,
        price="How much did {person} make in a week?\nWhat were {person}'s weekly wages?",
        job="What was {person}'s occupation?\nWhat did {person} work as in {town}?",
        town="In which town did {person} earn a living?",
    ),
    # -- addresses, phones, plates
    _fact(
        "addresses",
        """
        {person} {surname} has moved to {count} {street} in {town}
        the new address of {person} {surname} reads {count} {street}, {town}
        letters for {person} {surname} go to {count} {street}, {town}
        """,
        street="""
        On which street does {person} {surname} live now?
        What street should I write on an envelope to {person} {surname}?
        """,
        town="""
        Which town did {person} {surname} move to?
        Where must post for {person} {surname} be sent, which town?
        """,
        count="What house number belongs on letters for {person} {surname}?",
    ),
    _fact(
        "phone numbers",
        """
        you reach {person} by phone on {phone}
        the telephone of {person} is {phone}
        {person} can be called on {phone} after work
        """,
        phone="""
        How can I reach {person} by phone?
        What do I dial to talk to {person}?
        Which phone number has {person}?
        """,
        person="Whose telephone rings if I dial {phone}?",
    ),
    _fact(
        "phone numbers",
        """
        the night desk of {firm} answers on {phone}, the reference to quote being {code}
        call {phone} for the night desk of {firm} and quote {code}
        """,
        phone="On which line does the night desk of {firm} answer?\nHow do I ring {firm} at night?",
        code="Which reference must be quoted to {firm}?\nWhat shall I quote when I call {firm}?",
    ),
    _fact(
        "vehicles",
        """
        the {shade} van with the plate {plate} is driven by {person}
        {person} drives a {shade} van, licence plate {plate}
        """,
        plate="What plate does the van of {person} carry?\nHow is the {shade} van registered?",
        shade="Which colour has the van of {person}?\nWhat does {plate} look like from outside?",
        person="Who is the driver of the {shade} van?\nWho sits at the wheel of {plate}?",
    ),
    # -- cooking and farming
    _fact(
        "ingredients",
        """
        {person} puts {grams} of {ingredient} into the {dish}
        for {person}'s {dish} you weigh out {grams} of {ingredient}
        {grams} of {ingredient} go into the {dish} that {person} cooks
        """,
        grams="""
        How many grams of {ingredient} go into {person}'s {dish}?
        What quantity of {ingredient} does {person} take?
        """,
        ingredient="What does {person} put into the {dish}?\nWhat goes into the {dish}?",
        dish="Which dish does {person} use {ingredient} for?",
    ),
    _fact(
        "ingredients",
        """
        the {dish} has to stay in the oven for {minutes}
        leave the {dish} in the oven for {minutes} and it will be done
        """,
        minutes="""
        How long does the {dish} bake?
        For how many minutes is the {dish} left in the oven?
        """,
    ),
    _fact(
        "allergies",
        """
        {person} cannot eat {ingredient} and orders {dish} instead
        because {ingredient} does not agree with {person}, there is {dish}
        """,
        ingredient="""
        What must be kept off the plate of {person}?
        Which food does {person} not tolerate?
        """,
        dish="What does {person} order instead?\nWhat is cooked for {person}?",
    ),
    _fact(
        "crops",
        """
        on the upper field near {town} the {surname} farm grows {crop} this year
        the {surname} farm near {town} has switched to {crop}
        """,
        crop="What is grown on the {surname} farm?\nWhich crop stands on the field near {town}?",
        town="Near which town is the {surname} farm?",
        surname="Whose farm grows {crop}?",
    ),
    # -- who did what
    _fact(
        "who did what",
        """
        {person} lent the {object} to {person2} in {month}
        in {month} {person2} got the {object} from {person}
        it was {person} who gave {person2} the {object} one morning in {month}
        """,
        person2="To whom did {person} lend the {object}?\nWho got something from {person}?",
        person="From whom does {person2} have the {object}?\nWho let {person2} have the {object}?",
        object="What did {person} lend to {person2}?\nWhich thing changed hands in {month}?",
        month="In which month did {person2} get the {object}?",
    ),
    _fact(
        "who did what",
        """
        {person} left the {object} on the tram in {town}
        the {object} that {person} forgot on a tram turned up in {town}
        """,
        town="Where did {person} lose the {object}?\nIn what town was the {object} forgotten?",
        object="What did {person} forget on the tram?\nWhat was lost in {town}?",
        person="Who is missing the {object} since a tram ride?",
    ),
    _fact(
        "who did what",
        """
        {person} taught {person2} to play the {instrument}
        {person2} learnt the {instrument} from {person}
        """,
        instrument="Which instrument did {person2} learn?\nWhat does {person} teach {person2}?",
        person="Who was {person2}'s music teacher?\nFrom whom did {person2} learn to play?",
    ),
    _fact(
        "who did what",
        """
        {person} repaired the {object} while {person2} held the lamp
        with {person2} holding the lamp, {person} got the {object} to work again
        """,
        object="What did {person} repair?\nWhat works again thanks to {person}?",
        person2="Who held the lamp for {person}?\nWho helped while the {object} was repaired?",
    ),
    _fact(
        "who did what",
        """
        the {film} ticket that {person} had was for seat {seat}
        {person} watched {film} from seat {seat}
        """,
        seat="On which seat did {person} watch the film?\nWhere did {person} sit in the cinema?",
        film="What film did {person} see?\nWhat was shown while {person} sat in {seat}?",
    ),
    # -- measurements
    _fact(
        "measurements",
        """
        the {material} board in the shed of {person} measures {length}
        {person} cut the {material} board to {length}
        """,
        length="How long is the {material} board?\nTo what length did {person} cut the board?",
        material="What is {person}'s board made of?",
    ),
    _fact(
        "measurements",
        """
        the {creature} called {person} weighed {weight} at the last check
        at the last check the scales showed {weight} for {person} the {creature}
        """,
        weight="What did the {creature} weigh?\nHow heavy is {person} the {creature}?",
        creature="What kind of animal is {person}?\nWhich animal came to {weight} on the scales?",
    ),
    _fact(
        "measurements",
        """
        in {town} the thermometer stood at {degrees} on {weekday} night
        {weekday} night brought {degrees} to {town}
        """,
        degrees="How cold or warm was it in {town}?\nWhich temperature did {town} report?",
        weekday="On which night was it {degrees}?",
        town="Where were {degrees} measured?",
    ),
    _fact(
        "measurements",
        """
        patient {surname} had a temperature of {degrees} and was given {grams} of {ingredient} tea
        {grams} of {ingredient} tea were prescribed to patient {surname}, who ran {degrees}
        """,
        degrees="How high was the fever of patient {surname}?",
        ingredient="Which tea was patient {surname} prescribed?\nWhat did {surname} have to drink?",
    ),
    # -- preferences and people
    _fact(
        "preferences",
        """
        {person} prefers {pastime} to {pastime2}
        if there is a choice, {person} takes {pastime} over {pastime2}
        to {person} {pastime2} is a bore, while {pastime} is not
        """,
        pastime="Which pastime does {person} like better?\nWhat would {person} rather do?",
        pastime2="What does {person} find boring?\nWhich hobby comes second for {person}?",
    ),
    _fact(
        "preferences",
        """
        {person} wants the hall painted {shade} and the stairs {shade2}
        it shall be {shade} in the hall and {shade2} on the stairs, says {person}
        """,
        shade="Which paint does {person} want in the hall?",
        shade2="What colour shall the stairs be, if {person} decides?",
    ),
    _fact(
        "languages",
        """
        besides {language}, {person} from {town} also speaks {language2}
        {person}, who lives in {town}, grew up with {language} and later took up {language2}
        """,
        language2="Which language did {person} add later?",
        town="Where is {person} from?\nWhich town does the speaker of {language} live in?",
        person="Who speaks both {language} and {language2}?",
    ),
    _fact(
        "courses",
        """
        {person} {surname} lectures on {course} in the {room}
        the {course} lectures of {person} {surname} take place in the {room}
        """,
        room="In which room are the {course} lectures?\nWhere does {person} {surname} lecture?",
        course="What subject does {person} {surname} lecture on?\nWhat is taught in the {room}?",
        surname="What is the family name of {person} who lectures on {course}?",
    ),
    # -- work
    _fact(
        "jobs",
        """
        {person} leads the {team} department at {firm}
        at {firm} the {team} department is led by {person}
        """,
        person="Who is the head of {team} at {firm}?\nWho leads a department of {firm}?",
        team="Which department does {person} lead?\nWhat is {person} in charge of at {firm}?",
        firm="Which company employs {person}?\nFor whom does {person} lead a department?",
    ),
    _fact(
        "orders",
        """
        {firm} ordered {count} {part} under number {code}
        order {code} from {firm} is for {count} {part}
        we owe {firm} {count} {part}, order {code}
        """,
        count="How many {part} does {firm} want?\nWhat quantity is on order {code}?",
        part="Which parts did {firm} order?\nWhat is order {code} for?",
        code="Under what number did {firm} place its order?\nWhich order number has {firm}?",
        firm="Who placed order {code}?\nWho wants {part}?",
    ),
    _fact(
        "inventory",
        """
        shelf {shelf} holds {count} {part} of {material}
        there are {count} {part} of {material} left on shelf {shelf}
        """,
        count="How many {part} are left?\nWhat did the count of shelf {shelf} come to?",
        shelf="On which shelf are the {part}?\nWhere do we store the {part} of {material}?",
        material="What are the {part} made of?\nOf what material are the things on {shelf}?",
        part="What lies on shelf {shelf}?",
    ),
    _fact(
        "inventory",
        """
        the {object} went into box {code} together with the {instrument}
        whoever opens box {code} finds the {object} and the {instrument}
        """,
        code="Which box has the {object} in it?\nWhere was the {instrument} packed?",
        instrument="What was packed together with the {object}?",
        object="What lies beside the {instrument} in its box?",
    ),
    _fact(
        "places",
        """
        the {shop} is on {street}, just behind the {creature} statue
        behind the {creature} statue on {street} you will see the {shop}
        """,
        street="On what street do I find the {shop}?\nWhere is the {shop}?",
        creature="Which statue is the {shop} behind?\nWhat animal marks the way to the {shop}?",
        shop="What kind of shop is on {street}?",
    ),
    _fact(
        "places",
        """
        the ferry to {town} sails from pier {count} at {time}
        at {time} pier {count} sees the ferry to {town} off
        """,
        time="What time does the ferry to {town} sail?\nWhen is the departure for {town}?",
        count="Which pier is right for {town}?\nFrom what pier can one sail to {town}?",
        town="Where does the ferry from pier {count} go?",
    ),
    _fact(
        "reasons",
        """
        {person} came late because of {reason}
        the delay of {person} was down to {reason}
        as {person} put it, {reason} was to blame for being late
        """,
        reason="Why was {person} late?\nWhat excuse did {person} give?\nWhat held {person} up?",
        person="Who was delayed by {reason}?",
    ),
    _fact(
        "reasons",
        """
        {firm} closed its branch in {town} over {reason}
        the branch of {firm} in {town} had to shut, and the cause was {reason}
        """,
        reason="What led to the end of the branch in {town}?\nWhy did {firm} close a branch?",
        town="Where did {firm} give up a branch?\nWhich branch of {firm} is gone?",
    ),
    # -- computers
    _fact(
        "code",
        """
        the function {function} is defined in {module} and returns after {milliseconds}
        in {module} there is {function}, which takes {milliseconds}
        """,
        module="Which file defines {function}?\nWhere in the sources would I look for {function}?",
        milliseconds="How long does {function} run?\nWhat time does a call of {function} take?",
        function="What function is in {module}?",
    ),
    _fact(
        "code",
        """
        commit {digest} by {person} broke {function}
        {person}'s commit {digest} made the tests of {function} fail
        since {digest}, which {person} pushed, {function} has been failing
        """,
        digest="Which commit broke {function}?\nWhat is the hash of {person}'s commit?",
        person="Who pushed the commit that broke {function}?\nWho is the author of {digest}?",
        function="What does {digest} break?\nWhich function fails because of {person}?",
    ),
    _fact(
        "code",
        """
        from version {version} on, {function} no longer accepts {setting}
        the {setting} argument of {function} was removed in {version}
        """,
        version="Since which version does {function} refuse {setting}?",
        setting="Which argument was {function} stripped of?\nWhat was dropped in {version}?",
    ),
    _fact(
        "servers",
        """
        {service} runs on {address}, port {port}
        point your client at {address} with port {port} to reach {service}
        the {service} process listens at {address}:{port}
        """,
        address="On which host does {service} run?\nWhat IP address has {service}?",
        port="Which port is open for {service}?\nWhat port does {service} listen on?",
        service="What runs on {address}?\nWhich process took port {port}?",
    ),
    _fact(
        "servers",
        """
        {person} is on call for {service} until {weekday}
        until {weekday} all alarms of {service} go to {person}
        """,
        person="Who gets the alarms of {service}?\nWhom do we page if {service} is down?",
        weekday="How long is {person} on call?\nUntil which day do the alarms go to {person}?",
        service="Which system is {person} on call for?",
    ),
    _fact(
        "incidents",
        """
        {service} went down at {time}, and the log said "{fault}"
        at {time} an outage of {service} began with the message "{fault}"
        """,
        fault="What did the log of {service} say?\nWith which error did {service} go down?",
        time="When did the outage of {service} begin?\nAt what time did {service} fail?",
        service='Which system reported "{fault}"?',
    ),
    _fact(
        "surveys",
        """
        in the {town} survey {share} of those asked were in favour of {project}
        {share} of the people who were asked in {town} support {project}
        """,
        share="How large is the support for {project}?\nWhat share of {town} is in favour?",
        town="Where was the survey on {project} held?",
        project="Which plan were people in {town} asked about?",
    ),
    # -- facts in two parts, which some questions need both of
    _fact(
        "people and places",
        "{person} works for {firm}\n{person} has been with {firm} for years",
        "{firm} has its head office in {town}\nthe head office of {firm} is in {town}",
        town="""
        In what town is the company based that {person} works for?
        Where is the head office of {person}'s employer?
        """,
        firm="Which company has {person} been with?\nWho has a head office in {town}?",
    ),
    _fact(
        "people and places",
        "{person} shares an office with {person2}\n{person2} sits in one office with {person}",
        "the office of {person2} is the {room}\n{person2} was given the {room} as an office",
        room="""
        In which room does {person} work, given who shares that office?
        Where do I find {person}, who shares an office?
        """,
        person2="With whom does {person} share an office?\nWhose office is the {room}?",
    ),
    _fact(
        "parcels",
        "the parcel for {person} has the label {code}\nthe label of {person}'s parcel is {code}",
        "parcel {code} is waiting at the {shop}\nthe {shop} has taken in parcel {code}",
        shop="""
        Where can {person} collect the parcel?
        Which shop took in what was sent to {person}?
        """,
        person="Whose parcel is at the {shop}?\nWho should go to the {shop} for a parcel?",
        code="What is on the label of {person}'s parcel?",
    ),
    _fact(
        "trips",
        "{person} takes the coach to {town}\nthe coach to {town} has {person} on board",
        "the {town} coach is due {weekday} at {time}\non {weekday}, {time}, a coach goes to {town}",
        weekday="On which day does the coach leave that {person} takes?\nWhen is {person} off?",
        time="At what time does {person}'s coach set off?",
        person="Who will be on the coach on {weekday}?",
        town="Where does {person} go by coach?",
    ),
    _fact(
        "dependencies",
        "{service} calls {function} for every request\na request to {service} ends in {function}",
        "{function} reads its limits from {setting}\nthe limits of {function} come from {setting}",
        setting="Which setting do requests to {service} depend on in the end?",
        service="What system is affected if {setting} changes?\nWhich service calls {function}?",
        function="What reads {setting}?\nWhat does {service} call?",
    ),
    _fact(
        "meals",
        "on {weekday} it is {person}'s turn to cook\n{person} cooks every {weekday}",
        "{person} can cook nothing but {dish}\nwhenever {person} cooks, there is {dish}",
        dish="What will there be to eat on {weekday}?\nWhich dish can I expect on {weekday}?",
        weekday="On which day will there be {dish}?",
        person="Who is the cook on {weekday}?\nWho makes {dish}?",
    ),
    _fact(
        "stock",
        "the {part} come from {firm}\n{firm} makes the {part} for us",
        "{firm} delivers every {weekday}\nlorries of {firm} arrive on {weekday}",
        weekday="When are new {part} delivered?\nOn what weekday do {part} arrive?",
        part="What is delivered on {weekday}?\nWhat does {firm} make for us?",
        firm="Who is our supplier of {part}?",
    ),
    _fact(
        "relatives",
        "{person2} is the elder twin of {person}\n{person} has an elder twin, {person2}",
        "{person2} lives on {street}\nthe home of {person2} is on {street}",
        street="""
        On which street does the elder twin of {person} live?
        Where is {person}'s twin at home?
        """,
        person2="Who lives on {street}?\nWho is {person}'s twin?",
    ),
)

LISTINGS = (
    _listing(
        "table of departures",
        "town",
        "time",
        "Departures this afternoon:\nHere is the timetable of the coaches.",
        "| {town} | {time} |\n{town}  {time}\n- {time}: {town}",
        time="What is the departure time for {town} in the table?\nWhen does the {town} coach go?",
        town="Which destination is listed at {time}?",
    ),
    _listing(
        "price list",
        "object",
        "price",
        "Second-hand goods, prices as marked:\nThis is what the flea market stall asks.",
        "- {object}: {price}\n{object} ... {price}\n* {price} for the {object}",
        price="What price is marked on the {object}?\nHow much is the {object} at the stall?",
        object="Which article is marked {price}?",
    ),
    _listing(
        "shopping list",
        "ingredient",
        "grams",
        "Shopping for the canteen:\nTo buy:",
        "- {ingredient}, {grams}\n[ ] {grams} {ingredient}\n{ingredient}: {grams}",
        grams="How much {ingredient} is on the shopping list?\nWhat amount of {ingredient} to buy?",
        ingredient="What shall we buy {grams} of?",
    ),
    _listing(
        "config file",
        "setting",
        "count",
        "# limits.conf\nThe file limits.conf reads:",
        "{setting} = {count}\n{setting}: {count}\nset {setting} {count}",
        count="What is {setting} set to?\nWhich number does the config file give for {setting}?",
        setting="Which setting is {count}?",
    ),
    _listing(
        "log",
        "service",
        "fault",
        "Log of last night:\nThe log reads as follows.",
        "ERROR {service}: {fault}\n[warn] {service} - {fault}\nunit={service} msg={fault}",
        fault="Which error did {service} log?\nWhat was logged for {service}?",
        service="Which unit logged the line about {fault}?",
    ),
    _listing(
        "directory",
        "surname",
        "phone",
        "Extensions of the clinic:\nPhone list, please update:",
        "{surname}, tel. {phone}\n{surname} | {phone}\n{phone} - Dr {surname}",
        phone="Which extension has Dr {surname}?\nWhat does the phone list say for {surname}?",
        surname="Whose extension is {phone}?",
    ),
    _listing(
        "seating plan",
        "person",
        "seat",
        "Seats on the bus:\nThe seating plan:",
        "{seat}  {person}\n{person} -> {seat}\n- seat {seat}: {person}",
        seat="Which seat does the plan give to {person}?\nWhere is {person} seated?",
        person="Who is seated on {seat}?",
    ),
    _listing(
        "stock table",
        "part",
        "shelf",
        "Stock list of the workshop:\n| part | shelf |",
        "| {part} | {shelf} |\n{part};{shelf}\n{part} at {shelf}",
        shelf="At which place does the stock list have the {part}?\nWhere are {part} kept?",
        part="What is kept at {shelf}?",
    ),
    _listing(
        "hosts",
        "service",
        "address",
        "Hosts of the staging system:\n# /etc/hosts",
        "{address} {service}\nhost {service} has address {address}\n{service} A {address}",
        address="What does {service} resolve to?\nWhich IP stands beside {service}?",
        service="What name has the host {address}?",
    ),
    _listing(
        "results",
        "person",
        "length",
        "Long jump, best attempts:\nResults of the long throw:",
        "{person}: {length}\n1. {person} ({length})\n{person}\t{length}",
        length="How far did {person} get?\nWhat was {person}'s best attempt?",
        person="Who reached {length}?",
    ),
    _listing(
        "library loans",
        "film",
        "date",
        "On loan from the library:\nDue back:",
        "{film}, due {date}\n- {film} ({date})\n{date} / {film}",
        date="When is {film} due back?\nUntil what date is {film} on loan?",
        film="Which title must be back on {date}?",
    ),
    _listing(
        "releases",
        "version",
        "digest",
        "Checksums of the releases:\nTags and commits:",
        "{version} {digest}\n{digest}  kite-{version}.tar.gz\ntag {version} -> {digest}",
        digest="What is the checksum of {version}?\nWhich commit is tagged {version}?",
        version="Which release has the checksum {digest}?",
    ),
)

#: What may stand around a statement, so that the fact is in the middle of a sentence.
ASIDES = (
    "What few had been told, as nobody thought to ask, was that {fact}, and so the day went on.",
    "After a long pause somebody mentioned that {fact}, which nobody wrote down.",
    "Between two other pieces of news came the remark that {fact}, but then the talk moved on.",
    "It may not matter to everyone that {fact}, yet it has to be said somewhere.",
    "As far as one can tell from the papers, {fact}, although a few pages are torn.",
    "If the minutes are right, {fact}; the rest of the page is about parking.",
)

#: How a user tells a fact in a turn of a chat.
TELLINGS = (
    "{fact}.",
    "For later: {fact}.",
    "One more thing, {fact}.",
    "While I think of it, {fact}.",
    "Could you hold on to this for me? It is about my files: {fact}.",
    "I just heard that {fact}.",
    "Before we go on, a detail: {fact}.",
)

#: How a user tells a listing, or asks for a text to be read.
HANDINGS = (
    "Have a look at this.",
    "I am pasting something here.",
    "This came in by mail today:",
    "Please go over the following pages.",
)

#: What the assistant says to a fact, a listing or a text.
REPLIES = (
    "All right.",
    "Got it.",
    "Sure, I have that.",
    "Thanks, I will keep it in mind.",
    "Done reading.",
)

#: What a user says for the assistant to tell some prose.
REQUESTS = (
    "Carry on with the novel, please.",
    "What happens in the next scene?",
    "Let us hear some more of the book.",
    "Entertain me a little.",
)

#: How two questions are asked at once.
PAIRS_OF_QUESTIONS = (
    "Two things: {first} And: {second}",
    "{first} And then, {second}",
    "I have two questions. {first} {second}",
)
